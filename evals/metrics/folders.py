"""Folders of images and videos: what belongs to one, what a file holds, and results kept by content."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel import media
from dit_accel.files import atomic

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".mp4")
FRAME_CHOICES = ("all", "first", "middle")
ENTRIES = 2  # raised when a change of code changes what kept results would be

Track = Callable[[Iterable, str], Iterable]  # passes items on and shows how far it is


def untracked(items: Iterable, description: str) -> Iterable:
    """A `Track` that shows nothing."""
    return items


@dataclass(frozen=True)
class Folder:
    """The images and videos in a folder and its subfolders, in the order of their names.

    Hidden files and files of other kinds do not belong to it.
    """

    path: Path
    names: tuple[str, ...]  # relative, with forward slashes

    @classmethod
    def open(cls, path: str | Path) -> Folder:
        """Lists a folder.

        Raises:
            ValueError: no such folder, or nothing to measure in it.
        """
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"there is no folder {path}")
        files = [
            file.relative_to(path)
            for file in path.rglob("*")
            if file.suffix.lower() in SUFFIXES and file.is_file()
        ]
        names = sorted(file.as_posix() for file in files if not any(p.startswith(".") for p in file.parts))
        if not names:
            raise ValueError(f"{path} holds no images or videos ({', '.join(SUFFIXES)})")
        return cls(path, tuple(names))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def files(self) -> list[Path]:
        return [self.path / name for name in self.names]

    @property
    def jpegs(self) -> int:
        """How many files are compressed with loss as JPEG, whatever their suffix."""
        return sum(_is_jpeg(file) for file in self.files)


def _is_jpeg(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(3) == b"\xff\xd8\xff"


def check_frames(choice: str) -> str:
    """Returns a choice of frames if it is one.

    Raises:
        ValueError: neither a name nor a positive number.
    """
    if choice not in FRAME_CHOICES and not (re.fullmatch(r"[1-9]\d{0,8}", choice, re.ASCII)):
        raise ValueError(f"frames are {', '.join(FRAME_CHOICES)} or a number of them, got {choice!r}")
    return choice


def choose(frames: np.ndarray, choice: str) -> np.ndarray:
    """All, the first or the middle of `frames`, or so many evenly spaced ones, first and last included."""
    if choice == "all":
        return frames
    if choice == "first":
        return frames[:1]
    if choice == "middle":
        return frames[len(frames) // 2 :][:1]
    count = min(int(choice), len(frames))
    return frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]


def read(path: Path, choice: str = "all") -> np.ndarray:
    """The chosen frames of an image or video, uint8 (frames, height, width, 3); see `media.load`.

    Raises:
        ValueError: as `media.load`.
    """
    return choose(media.load(path), choice)


def combined(parts: Sequence[Any]) -> str:
    """SHA-256 of values that JSON knows."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Store:
    """Arrays kept on disk under the hash of what they were computed from; None keeps nothing.

    An interrupted run leaves whole entries only, and the next one goes on from there.
    """

    folder: Path | None

    def get(self, key: Sequence[Any], compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The array kept under `key`, computed and kept if there is none.

        Raises:
            ValueError: an entry that something else has damaged.
        """
        if self.folder is None:
            return compute()
        name = combined([ENTRIES, *key])
        path = self.folder / name[:2] / f"{name}.npy"
        if path.exists():
            try:
                return np.load(path, allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise ValueError(f"the kept result {path} is damaged ({error}); delete it") from error
        array = compute()
        with atomic(path) as temporary:
            np.save(temporary, array)
        return array
