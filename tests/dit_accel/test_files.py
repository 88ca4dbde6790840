"""Text files in every shape that editors write, and files that are written whole or not at all."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dit_accel import files
from dit_accel.files import atomic, ended_by_sigterm, read_lines, read_text, write_text

BOM = b"\xef\xbb\xbf"

# -- reading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [b"", BOM], ids=["plain", "mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["unix", "windows", "old-mac"])
@pytest.mark.parametrize("last", [True, False], ids=["ended", "not-ended"])
def test_lines_are_the_same_however_they_are_saved(tmp_path, mark, end, last):
    lines = ["a red circle", "", "  ein grüner Kreis ", "日本\u2028語", "\ufeff a mark within"]
    text = end.join(lines) + (end if last else "")
    (tmp_path / "a.txt").write_bytes(mark + text.encode())
    expected = ["a red circle", "ein grüner Kreis", "日本\u2028語", "\ufeff a mark within"]
    assert read_lines(tmp_path / "a.txt") == expected
    assert read_text(tmp_path / "a.txt") == "\n".join(lines) + ("\n" if last else "")


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "latin-1", "cp1252", "gbk", "utf-32"]
)
def test_other_encodings_are_refused_by_name(tmp_path, encoding):
    path = tmp_path / "a.txt"
    text = "你好 a cat" if encoding == "gbk" else "café au lait"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=r"UTF-8|is not text") as error:
        read_text(path)
    assert str(path) in str(error.value)


def test_the_offset_of_what_is_not_text_is_told(tmp_path):
    (tmp_path / "a").write_bytes(BOM + b"abc\xffdef")
    with pytest.raises(ValueError, match=r"byte 0xff at offset 6"):
        read_text(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"abc\0def")
    with pytest.raises(ValueError, match="NUL byte at offset 3"):
        read_text(tmp_path / "a")


@pytest.mark.parametrize("content", [b"", BOM, b"\n\n  \r\n\t"], ids=["nothing", "mark", "space"])
def test_no_lines_is_an_error_that_says_empty(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match="a is empty"):
        read_lines(tmp_path / "a")


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=f"there is no file {tmp_path}/none"):
        read_text(tmp_path / "none")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_text(tmp_path)
    with pytest.raises(ValueError, match="/dev/null is empty"):
        read_lines("/dev/null")


def test_pipes_are_read(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(BOM + b"one\r\ntwo",))
    writer.start()
    assert read_lines(pipe) == ["one", "two"]
    writer.join()


# -- writing -------------------------------------------------------------------------------------------------


def test_text_is_written_as_utf_8_with_unix_line_ends(tmp_path):
    write_text(tmp_path / "deep" / "a.txt", "grün\n日本")
    assert (tmp_path / "deep" / "a.txt").read_bytes() == "grün\n日本".encode()


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemExit, GeneratorExit, ValueError])
def test_a_failed_write_leaves_the_old_file_alone(tmp_path, failure):
    path = tmp_path / "kept.txt"
    path.write_text("old")

    def fail():
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise failure

    with pytest.raises(failure):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_files_get_the_permissions_of_new_files(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def writing(path):
    """A process that is in the middle of writing a file."""
    code = (
        f"import signal, sys, time; sys.path.insert(0, {str(Path(files.__file__).parent)!r})\n"
        "from files import atomic  # without torch, which takes seconds\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it\n"
        f"with atomic({str(path)!r}) as temporary:\n"
        "    temporary.write_text('half'); print('half', flush=True)\n"
        "    for _ in range(600): time.sleep(0.1)  # a signal right before one long sleep is lost"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "half\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_ended_leaves_nothing(tmp_path, number):
    process = writing(tmp_path / "video.mp4")
    assert len(list(tmp_path.iterdir())) == 1
    process.send_signal(number)
    assert process.wait(300) == (143 if number == signal.SIGTERM else -signal.SIGINT)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_goes_when_the_file_is_written_again(tmp_path):
    path = tmp_path / "a [1].video.mp4"
    process = writing(path)
    process.kill()
    process.wait(300)
    (left,) = tmp_path.iterdir()
    other = tmp_path / ".a [1].video-original.mp4"
    other.write_text("of somebody else")
    write_text(tmp_path / "b.mp4", "another file")
    assert left.exists()
    write_text(path, "whole")
    assert sorted(tmp_path.iterdir()) == sorted([path, other, tmp_path / "b.mp4"])


def test_what_a_living_process_writes_is_left_to_it(tmp_path):
    process = writing(tmp_path / "video.mp4")
    (theirs,) = tmp_path.iterdir()
    write_text(tmp_path / "video.mp4", "ours")
    assert theirs.exists()
    process.send_signal(signal.SIGTERM)
    process.wait(300)
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]


def test_many_threads_and_processes_write_one_file(tmp_path):
    path = tmp_path / "a.txt"

    def write():
        for _ in range(50):
            write_text(path, "whole")

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_handlers_of_sigterm_are_as_before():
    with ended_by_sigterm():
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        with pytest.raises(SystemExit, match="143"):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with ended_by_sigterm():
            signal.raise_signal(signal.SIGTERM)
        assert seen == [1]
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
