"""Commands whose input is a pipe, empty or in another encoding, and that are ended while saving."""

import json
import os
import signal
import subprocess
import sys

import pytest

FULL_INFO = [
    {"prompt_en": "a grün cat", "dimension": ["color"]},
    {"prompt_en": "a dog", "dimension": ["color"]},
]


@pytest.fixture
def prompts(cli_of):
    return cli_of("eval", "vbench", "prompts", "--dimensions", "color")


def piped(content: bytes) -> str:
    """The path of a pipe that holds `content`, as `<(...)` of a shell gives it."""
    read, write = os.pipe()
    os.write(write, content)
    os.close(write)
    return f"/dev/fd/{read}"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "mark"])
def test_prompts_come_through_a_pipe(prompts, mark):
    path = piped(mark + "a grün cat\r\n\r\na dog".encode())
    answer = json.loads(prompts.run("--prompts", path, "--json").stdout)
    assert answer["dimensions"] == {"color": ["a grün cat", "a dog"]}


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (("eval", "vbench", "prompts"), ("--dimensions", "color")),
        (("eval", "sweep"), ("--model", "tiny-flux", "--no-plot", "--recipe", "tiny-flux-clear")),
        (("hunt",), ("--model", "tiny-flux", "--objective", "attributes", "--no-pictures")),
    ],
    ids=lambda words: " ".join(words),
)
def test_prompts_that_are_empty_or_no_text(cli_of, tmp_path, words, needed):
    command, out = cli_of(*words), () if "vbench" in words else ("--out", tmp_path / "out")
    (tmp_path / "latin.txt").write_bytes("a grün cat".encode("latin-1"))
    for path, message in (
        ("/dev/null", "/dev/null is empty"),
        (piped(b""), "is empty"),
        (piped(b"\xef\xbb\xbf\n"), "is empty"),
        (tmp_path / "none.txt", f"there is no file {tmp_path}/none.txt"),
        (tmp_path / "latin.txt", f"{tmp_path}/latin.txt is not UTF-8: byte 0xfc at offset 4"),
        (tmp_path, f"{tmp_path} cannot be read: Is a directory"),
    ):
        assert message in command.error(*needed, *out, "--prompts", path)
    assert not (tmp_path / "out").exists()


def test_full_info_with_a_byte_order_mark(prompts, tmp_path):
    (tmp_path / "info.json").write_text(json.dumps(FULL_INFO), encoding="utf-8-sig")
    answer = json.loads(prompts.run("--prompts", tmp_path / "info.json", "--json").stdout)
    assert answer["dimensions"] == {"color": ["a grün cat", "a dog"]}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_ended_while_saving_leaves_nothing(tmp_path, number):
    """The video is written slowly, in the middle of which the process is ended."""
    code = (
        "import signal, sys, time\n"
        "from dit_accel import cli, media\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it\n"
        "def slowly(path, *rest):\n"
        "    path.write_bytes(b'half'); print('half', flush=True)\n"
        "    for _ in range(600): time.sleep(0.1)  # a signal right before one long sleep is lost\n"
        "media._save_mp4 = slowly\n"
        "sys.argv = 'dit-accel generate -m tiny-wan -p a --steps 1 --out a.mp4'.split()\n"
        "cli.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "half\n"
    assert len(list(tmp_path.iterdir())) == 1
    process.send_signal(number)
    assert process.wait(300) == (143 if number == signal.SIGTERM else 130)
    assert not list(tmp_path.iterdir())
