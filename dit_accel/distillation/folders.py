"""Folders of images or videos with captions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.files import read_text
from dit_accel.json_files import from_json

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".mp4")
METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Item:
    """A file and its caption."""

    path: Path
    caption: str


def read_folder(folder: Path, count: int | None = None) -> list[Item]:
    """The images or videos of a folder with their captions, by name; the first `count`, or all.

    Captions are in `metadata.jsonl`, an object on each line with `file_name` and `text` (as Hugging Face's
    `imagefolder` has them), or beside each file in one of the same name with the suffix `.txt`.

    Raises:
        ValueError: no folder, files without captions, captions without files, or fewer than `count`.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    found = _of_metadata(folder) if (folder / METADATA).is_file() else _of_text_files(folder)
    if not found:
        raise ValueError(f"{folder} has no images or videos ({', '.join(SUFFIXES)})")
    if count is not None and count > len(found):
        raise ValueError(f"`samples` is {count}, and {folder} has {len(found)} captioned files")
    return sorted(found, key=lambda item: item.path.name)[:count]


def _of_metadata(folder: Path) -> list[Item]:
    found = []
    for number, line in enumerate(read_text(folder / METADATA).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{folder / METADATA}, line {number}"
        try:
            said = from_json(line)
        except ValueError as error:
            raise ValueError(f"{where} is no JSON: {error}") from None
        name = said.get("file_name") if isinstance(said, dict) else None
        caption = said.get("text") if isinstance(said, dict) else None
        if not isinstance(name, str) or not isinstance(caption, str):
            raise ValueError(f"{where} must be an object with `file_name` and `text`, got {line!r:.200}")
        path = folder / name
        if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{where} names {name!r:.200}, and there is no such file in the folder")
        found.append(Item(path, caption))
    return found


def _of_text_files(folder: Path) -> list[Item]:
    found = []
    for path in folder.iterdir():
        if path.suffix.lower() not in SUFFIXES:
            continue
        text = path.with_suffix(".txt")
        if not text.is_file():
            raise ValueError(f"{path} has no caption: write it into {text.name} beside it, or a {METADATA}")
        found.append(Item(path, " ".join(read_text(text).split())))
    return found


def frames_of(item: Item, call: Mapping[str, Any], video: bool, temporal: int) -> np.ndarray:
    """Frames of a file, uint8 (F, H, W, 3), as many and as large as a pipeline's call says.

    Args:
        call: its `height` and `width`, to which frames are resized and cropped in their middle, and
            `num_frames`, the first of which are taken; what it does not say is the file's own.
        video: whether a video is wanted.
        temporal: frames of a latent after the first, of which there must be whole ones.

    Raises:
        ValueError: a video for an image model, or one with too few frames.
    """
    from dit_accel import media

    frames = media.load(item.path)
    if not video and len(frames) > 1:
        raise ValueError(f"{item.path} has {len(frames)} frames, and this model makes images")
    wanted = call.get("num_frames") or (len(frames) - 1) // temporal * temporal + 1
    if video and wanted > len(frames):
        raise ValueError(f"{item.path} has {len(frames)} frames, fewer than `num_frames`, {wanted}")
    frames = frames[: wanted if video else 1]
    size = call.get("width") or frames.shape[2], call.get("height") or frames.shape[1]
    if size == (frames.shape[2], frames.shape[1]):
        return frames
    import numpy as np
    from PIL import Image, ImageOps

    fitted = [ImageOps.fit(Image.fromarray(one), size, Image.Resampling.LANCZOS) for one in frames]
    return np.stack([np.asarray(one) for one in fitted])
