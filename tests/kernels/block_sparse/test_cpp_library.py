"""Compiled libraries in the cache folder: damaged, planted, of another processor, without a compiler."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from dit_accel.errors import UnavailableError
from dit_accel.kernels.block_sparse import cpp_library

COMPILER = shutil.which("g++") or shutil.which("clang++")
ROOT = os.name == "posix" and os.geteuid() == 0
pytestmark = pytest.mark.skipif(os.name != "posix" or not COMPILER, reason="needs POSIX and a C++ compiler")


class Cache:
    """A cache folder, a source whose function returns 42, and a compiler that counts its calls."""

    def __init__(self, root: Path):
        self.root, self.folder = root, root / "cache" / "dit_accel"
        self.source = root / "sample.cpp"
        self.source.write_text('extern "C" int answer() { return 42; }\n')
        self.calls = root / "calls"
        compiler = root / "bin" / "g++"
        compiler.parent.mkdir()
        compiler.write_text(f'#!/bin/sh\necho called >> {self.calls}\nexec {COMPILER} "$@"\n')
        compiler.chmod(0o755)

    def answer(self, function: str = "answer") -> int:
        """What the library's function returns, in a process that has loaded nothing yet."""
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
            return pool.submit(_call, self.source, function).result()

    @property
    def compiled(self) -> int:
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0

    @property
    def library(self) -> Path:
        (path,) = self.folder.glob("*.so")
        return path

    @property
    def record(self) -> Path:
        (path,) = self.folder.glob("*.json")
        return path

    def built(self, code: str) -> bytes:
        """Another library's bytes."""
        source, made = self.root / "other.cpp", self.root / "other.so"
        source.write_text(code)
        subprocess.run([COMPILER, "-shared", "-fPIC", str(source), "-o", str(made)], check=True)
        return made.read_bytes()

    def plant(self, data: bytes) -> None:
        """Another library in place of the one that is kept, with a record that fits it."""
        digest = hashlib.sha256(data).hexdigest()
        record = self.record
        self.library.unlink()
        (self.folder / f"{record.stem}-{digest[:16]}.so").write_bytes(data)
        record.write_text(json.dumps({"size": len(data), "sha256": digest}))


def _call(source: Path, function: str) -> int:
    return getattr(cpp_library.load(source, [function]), function)()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache


@pytest.fixture
def without_compiler(monkeypatch, tmp_path):
    """Takes every compiler off the path, when called."""
    (tmp_path / "empty").mkdir()
    return lambda: monkeypatch.setenv("PATH", str(tmp_path / "empty"))


PLANTED = 'extern "C" int answer() { return 13; }\n'


def test_it_is_compiled_once_and_only_the_user_may_write_it(cache):
    old = os.umask(0)
    try:
        assert [cache.answer(), cache.answer()] == [42, 42]
    finally:
        os.umask(old)
    assert cache.compiled == 1
    assert sorted(cache.folder.iterdir()) == sorted([cache.library, cache.record])
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert not any(path.stat().st_mode & 0o077 for path in cache.folder.iterdir())


def test_what_the_source_includes_counts(cache):
    """Another file beside it is another library, the same one is not compiled again."""
    header = cache.source.with_name("sample.h")
    cache.source.write_text('#include "sample.h"\n')
    for number, compiled in ((7, 1), (7, 1), (8, 2)):
        header.write_text(f'extern "C" int answer() {{ return {number}; }}\n')
        assert cache.answer() == number
        assert cache.compiled == compiled


def test_files_are_on_the_disk_before_they_have_their_names(cache, monkeypatch):
    events, fsync, replace = [], os.fsync, Path.replace

    def synced(descriptor):
        events.append(("synced", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def named(path, target):
        events.append(("named", path.stat().st_ino))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", named)
    cpp_library.load(cache.source, ["answer"])
    assert [event for event, _ in events] == ["synced", "named"] * 2
    assert [inode for _, inode in events[::2]] == [inode for _, inode in events[1::2]]


# -- damage --------------------------------------------------------------------------------------------------


def replaced(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def linked(cache: Cache) -> None:
    """The library becomes a link to its very self elsewhere: what it is today it need not be tomorrow."""
    elsewhere = cache.library.rename(cache.root / "elsewhere.so")
    (cache.folder / "name").symlink_to(elsewhere)
    record = json.loads(cache.record.read_text())
    (cache.folder / "name").rename(cache.folder / f"{cache.record.stem}-{record['sha256'][:16]}.so")


DAMAGE = {
    "empty": lambda cache: replaced(cache.library, b""),
    "half": lambda cache: replaced(
        cache.library, cache.library.read_bytes()[: cache.library.stat().st_size // 2]
    ),
    "garbage": lambda cache: replaced(cache.library, os.urandom(cache.library.stat().st_size)),
    "one bit": lambda cache: replaced(cache.library, flipped(cache.library.read_bytes())),
    "longer": lambda cache: replaced(cache.library, cache.library.read_bytes() + b"\0"),
    "another library": lambda cache: replaced(cache.library, cache.built(PLANTED)),
    "no library": lambda cache: cache.library.unlink(),
    "a link": linked,
    "writable by the group": lambda cache: cache.library.chmod(0o770),
    "writable by all": lambda cache: cache.library.chmod(0o777),
    "not the functions": lambda cache: cache.plant(cache.built("int other() { return 13; }")),
    "not a library": lambda cache: cache.plant(b"#!/bin/sh\n"),
    "empty record": lambda cache: cache.record.write_text(""),
    "record of another kind": lambda cache: cache.record.write_text("[1, 2]"),
    "record without a size": lambda cache: cache.record.write_text('{"sha256": "0"}'),
    "record of other types": lambda cache: cache.record.write_text('{"size": "big", "sha256": null}'),
    "record in no encoding": lambda cache: cache.record.write_bytes(b"\xff\xfe\xfd"),
    "no record": lambda cache: cache.record.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_damaged_is_compiled_again_once(cache, damage):
    assert cache.answer() == 42
    damage(cache)
    assert [cache.answer(), cache.answer()] == [42, 42]
    assert cache.compiled == 2


@pytest.mark.skipif(not ROOT, reason="only root can give a file away")
@pytest.mark.parametrize("which", ["library", "record"])
def test_what_belongs_to_somebody_else_is_compiled_again(cache, which):
    assert cache.answer() == 42
    os.chown(getattr(cache, which), 12345, 12345)
    assert [cache.answer(), cache.answer()] == [42, 42]
    assert cache.compiled == 2
    assert getattr(cache, which).stat().st_uid == 0


def test_a_source_without_the_function_is_a_reason_and_no_loop(cache):
    with pytest.raises(
        UnavailableError, match=r"sample, compiled by `.*`, cannot be used: .* has no function absent"
    ):
        cpp_library.load(cache.source, ["answer", "absent"])
    assert cache.compiled <= len({shutil.which(name) for name in ("g++", "clang++", "c++")})


# -- folder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o777, 0o722, 0o770, 0o1777])
def test_a_folder_that_others_can_write_is_refused(cache, mode):
    assert cache.answer() == 42
    cache.plant(cache.built(PLANTED))
    cache.folder.chmod(mode)
    with pytest.raises(
        UnavailableError, match=r"others can write .*dit_accel \(mode .*set XDG_CACHE_HOME to a folder"
    ):
        cache.answer()
    assert cache.compiled == 1


@pytest.mark.parametrize("mode", [0o755, 0o700, 0o711])
def test_a_folder_that_others_could_only_read_becomes_private(cache, mode):
    cache.folder.mkdir(parents=True)
    cache.folder.chmod(mode)
    cache.folder.parent.chmod(0o777)
    assert cache.answer() == 42
    assert cache.folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(not ROOT, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_refused(cache):
    assert cache.answer() == 42
    cache.plant(cache.built(PLANTED))
    os.chown(cache.folder, 12345, 12345)
    with pytest.raises(UnavailableError, match="dit_accel belongs to user 12345, not to 0"):
        cache.answer()


def test_a_folder_that_is_a_link_is_refused(cache):
    (cache.root / "elsewhere").mkdir()
    cache.folder.parent.mkdir()
    cache.folder.symlink_to(cache.root / "elsewhere")
    with pytest.raises(UnavailableError, match="is a symbolic link"):
        cache.answer()
    assert not list((cache.root / "elsewhere").iterdir())


def test_a_folder_that_cannot_be_made_is_refused(cache, monkeypatch):
    (cache.root / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.root / "file"))
    with pytest.raises(UnavailableError, match="set XDG_CACHE_HOME to a folder"):
        cache.answer()


@pytest.mark.parametrize("value", ["planted", "./planted", "../here/planted", "~/planted", "", None])
def test_a_relative_cache_folder_is_ignored(cache, monkeypatch, value):
    """The current folder may be anybody's; the XDG specification wants relative values to be ignored."""
    here, home = cache.root / "here", cache.root / "home"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "planted"))
    assert cache.answer() == 42
    cache.folder = here / "planted" / "dit_accel"
    cache.plant(cache.built(PLANTED))
    assert cache.answer() == 13
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", value) if value is not None else monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.answer() == 42
    assert len(list((home / ".cache" / "dit_accel").iterdir())) == 2


def test_without_a_home_folder(cache, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(UnavailableError, match=r"Could not determine home .*set XDG_CACHE_HOME"):
        cache.answer()


# -- compilers and processors --------------------------------------------------------------------------------


def test_what_is_kept_needs_no_compiler(cache, without_compiler):
    assert cache.answer() == 42
    without_compiler()
    assert cache.answer() == 42
    assert cache.compiled == 1


def test_no_compiler_is_a_reason(cache, without_compiler):
    without_compiler()
    with pytest.raises(
        UnavailableError, match=r"^sample compiles C\+\+ and no compiler was found; install g\+\+"
    ):
        cache.answer()


def test_damage_without_a_compiler_says_both(cache, without_compiler):
    assert cache.answer() == 42
    replaced(cache.library, b"")
    without_compiler()
    with pytest.raises(UnavailableError, match=r"is not what was compiled, .*; .* no compiler was found"):
        cache.answer()


@pytest.mark.parametrize("change", ["processor", "flags", "source"])
def test_another_processor_flag_or_source_is_another_library(cache, monkeypatch, without_compiler, change):
    assert cache.answer() == 42
    first = cache.library
    if change == "processor":
        monkeypatch.setattr(cpp_library, "processor", lambda: "flags: fpu mmx")
    elif change == "flags":
        monkeypatch.setattr(cpp_library, "FLAGS", ("-O1", *cpp_library.FLAGS[1:]))
    else:
        cache.source.write_text('extern "C" int answer() { return 43; }\n')
    path = os.environ["PATH"]
    without_compiler()
    with pytest.raises(UnavailableError, match="no compiler was found"):
        cache.answer()
    monkeypatch.setenv("PATH", path)
    assert cache.answer() == (43 if change == "source" else 42)
    assert cache.compiled == 2
    assert first.exists()


def test_the_processor_is_told_by_its_instructions(monkeypatch):
    """Two machines whose processors differ in one instruction set, or only in how busy they are."""
    kinds = {}
    for name, flags, clock in (
        ("a", "fpu avx2", 800),
        ("b", "fpu avx2 amx_tile", 800),
        ("c", "fpu avx2", 3100),
    ):
        text = "".join(
            f"processor\t: {i}\nflags\t\t: {flags}\ncpu MHz\t\t: {clock + i}\n\n" for i in range(2)
        )
        monkeypatch.setattr(Path, "read_text", lambda path, text=text: text)
        kinds[name] = cpp_library.processor()
    assert kinds["a"] != kinds["b"]
    assert kinds["a"] == kinds["c"]


def test_an_unknown_processor_is_this_machine_alone(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path: "processor\t: 0\n")
    monkeypatch.setattr(cpp_library.platform, "node", lambda: "one")
    one = cpp_library.processor()
    monkeypatch.setattr(cpp_library.platform, "node", lambda: "two")
    assert cpp_library.processor() != one


def test_the_next_compiler_is_tried(cache, monkeypatch):
    broken = cache.root / "broken"
    broken.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert cache.answer() == 42


def test_a_source_that_does_not_compile_is_a_reason_and_leaves_nothing(cache):
    cache.source.write_text("int main( {")
    with pytest.raises(UnavailableError, match=r"could not be compiled: `.*` says .*expected"):
        cache.answer()
    assert list(cache.folder.iterdir()) == []
