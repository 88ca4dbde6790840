"""One visitor's browser tab: its own folder, and the run it may cancel. Both go when the tab does."""

from __future__ import annotations

import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .settings import Caps


class Cancelled(Exception):
    """The visitor cancelled the run, or closed the tab."""


class Session:
    """Made by `Sessions.of`. The folder's name is drawn, so that no other visitor can guess it."""

    def __init__(self, root: Path, kept: int):
        self.folder = root / secrets.token_urlsafe(24)
        self.folder.mkdir(mode=0o700)
        self.used = time.monotonic()
        self.drawings = 0  # so far, by which figures that are late know it
        self._kept, self._results = kept, []
        self._lock, self._ended = threading.Lock(), False
        self._runs: set[threading.Event] = set()

    @contextmanager
    def run(self) -> Iterator[threading.Event]:
        """For the length of a run: the event that is set when it is to stop."""
        stop = threading.Event()
        with self._lock:
            self._runs.add(stop)
        try:
            yield stop
        finally:
            with self._lock:
                self._runs.discard(stop)
            self.used = time.monotonic()

    def cancel(self) -> int:
        """Stops what runs at the end of its step; returns how many runs that are."""
        with self._lock:
            for stop in self._runs:
                stop.set()
            return len(self._runs)

    @contextmanager
    def result(self) -> Iterator[Path]:
        """A folder for one result's files, while the session cannot end; the oldest result may go for it.

        Raises:
            Cancelled: the session has ended.
        """
        with self._lock:
            if self._ended:
                raise Cancelled
            folder = self.folder / secrets.token_hex(8)
            folder.mkdir()
            self._results.append(folder)
            for old in self._results[: -self._kept]:
                shutil.rmtree(old, ignore_errors=True)
            del self._results[: -self._kept]
            yield folder

    def end(self) -> None:
        """Cancels what runs and deletes the folder."""
        self.cancel()
        with self._lock:
            self._ended = True
            shutil.rmtree(self.folder, ignore_errors=True)


class Sessions:
    """All sessions of a server, by the hash that Gradio gives a browser tab or client."""

    def __init__(self, root: Path, caps: Caps):
        self._root, self._caps = root, caps
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}

    def of(self, key: str | None) -> Session:
        """The session of a tab, made where there is none; those that were idle too long are ended."""
        now = time.monotonic()
        with self._lock:
            old = [k for k, one in self._sessions.items() if now - one.used > self._caps.idle and k != key]
            ended = [self._sessions.pop(k) for k in old]
            session = self._sessions.get(str(key))
            if session is None:
                session = self._sessions[str(key)] = Session(self._root, self._caps.kept)
            session.used = now
        for one in ended:
            one.end()
        return session

    def end(self, key: str | None) -> None:
        """The tab was closed."""
        with self._lock:
            session = self._sessions.pop(str(key), None)
        if session is not None:
            session.end()

    def end_all(self) -> None:
        """The server stops."""
        for key in list(self._sessions):
            self.end(key)

    def __len__(self) -> int:
        return len(self._sessions)
