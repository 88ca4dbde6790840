"""Files read whole as UTF-8 text, and written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

try:
    import fcntl
except ImportError:  # not on Windows, where leftovers of killed processes stay
    fcntl = None


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark; any line ends become newlines.

    Pipes and devices such as `/dev/stdin` are read to their end.

    Raises:
        ValueError: a file that is missing or unreadable, in another encoding, or with NUL bytes in it.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path} is not UTF-8 but UTF-16, by its byte order mark; save it as UTF-8")
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start} cannot be part "
            "of it; save it as UTF-8"
        ) from None
    if (at := content.find(b"\0")) >= 0:
        raise ValueError(f"{path} is not text: there is a NUL byte at offset {at}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def digest(path: Path) -> str:
    """SHA-256 of a file's content.

    Raises:
        ValueError: a file that cannot be read.
    """
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return found.hexdigest()


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file, see `read_text`, without the space around them and without empty ones.

    Raises:
        ValueError: as `read_text`, or a file without a line.
    """
    lines = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty: it holds no line of text")
    return lines


def write_text(path: str | Path, text: str) -> None:
    """Writes text as UTF-8, see `atomic`."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` that takes its place on success and is deleted on failure.

    Failure is any exception, Ctrl-C and SIGTERM. What a process that was killed has left of the same file is
    deleted as well.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with ended_by_sigterm():
        _sweep(path)
        with _temporary(path) as temporary:
            yield temporary
            temporary.replace(path)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within, SIGTERM raises `SystemExit(143)`, so that what is begun is cleaned up, as after Ctrl-C.

    A handler that is set already stays, and in threads other than the main one nothing changes.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


# -- temporary files -----------------------------------------------------------------------------------------
# A live one is locked by its process, and the lock goes with the process, however that ends.


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """An empty file beside `path`, locked, and deleted at the end if it is still there."""
    while True:
        temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
        handle = None
        try:
            handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            if fcntl is None:
                os.close(handle)
                handle = None
            else:
                _lock(handle)
            if temporary.exists():  # not swept before it was locked
                yield temporary
                return
        finally:
            if handle is not None:
                os.close(handle)
            temporary.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Deletes temporary files of `path` that no process holds."""
    if fcntl is None:
        return
    ours = re.compile(rf"\.{re.escape(path.stem)}-[0-9a-f]{{8}}{re.escape(path.suffix)}")
    for name in filter(ours.fullmatch, os.listdir(path.parent)):
        with suppress(OSError), path.with_name(name).open("rb") as file:  # gone, or another user's
            if _lock(file.fileno(), wait=False):
                path.with_name(name).unlink(missing_ok=True)


def _lock(handle: int, wait: bool = True) -> bool:
    """Whether an open file could be locked; not where another process holds it, or files cannot be locked."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True
