"""Reading, writing and arranging images and videos as uint8 arrays of shape (frames, height, width, 3)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

IMAGE_SUFFIXES = (".png",)
VIDEO_SUFFIXES = (".mp4", ".gif", ".png")
STRIP_FRAMES = 6  # a video written as PNG becomes a strip of this many frames, first and last included
BACKGROUND = (255, 255, 255)
MIN_PANEL = 256  # pixels; smaller pictures are enlarged by whole factors so that a label fits


def check_suffix(path: str | Path, video: bool) -> Path:
    """Returns `path` if its suffix names a format that can hold the result.

    Raises:
        ValueError: another suffix.
    """
    path = Path(path)
    allowed = VIDEO_SUFFIXES if video else IMAGE_SUFFIXES
    if path.suffix.lower() not in allowed:
        kind = "a video" if video else "an image"
        raise ValueError(f"{kind} is written as {' or '.join(allowed)}, got the file name {path.name!r}")
    return path


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` that takes its place on success and is deleted on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=path.suffix, prefix=f".{path.stem}-", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def to_uint8(array: np.ndarray) -> np.ndarray:
    """Floats in [0, 1], as pipelines return them, to uint8; not-a-number raises instead of turning black."""
    if array.dtype == np.uint8:
        return array
    if not np.isfinite(array).all():
        raise ValueError("the model returned values that are not finite: nothing to show")
    return (array.clip(0, 1) * 255).round().astype(np.uint8)


def strip(frames: np.ndarray, count: int = STRIP_FRAMES) -> np.ndarray:
    """Up to `count` evenly spaced frames beside each other: (1, height, n * width, 3)."""
    picks = np.unique(np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int))
    return np.concatenate(list(frames[picks]), axis=1)[None]


def save(path: str | Path, frames: np.ndarray, fps: int = 8, lossless: bool = False) -> Path:
    """Writes `frames` in the format of the suffix, atomically.

    PNG is lossless; of a video it holds a `strip`. GIF merges equal neighbouring frames into a longer one.
    MP4 is H.264 in 4:2:0; an odd height or width gets one more row or column. A `lossless` MP4 is H.264 of
    the RGB values, which `load` gives back and VLC or mpv play, but few browsers.
    """
    path = check_suffix(path, video=len(frames) > 1)
    with atomic(path) as temporary:
        suffix = path.suffix.lower()
        if suffix == ".png":
            Image.fromarray(strip(frames)[0]).save(temporary)
        elif suffix == ".gif":
            first, *rest = (Image.fromarray(frame).quantize(dither=Image.Dither.NONE) for frame in frames)
            first.save(temporary, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
        else:
            _save_mp4(temporary, frames, fps, lossless)
    return path


def _save_mp4(path: Path, frames: np.ndarray, fps: int, lossless: bool) -> None:
    import imageio.v2 as imageio

    options = {"macro_block_size": 1, "quality": None, "ffmpeg_log_level": "error"}
    if lossless:
        options |= {"codec": "libx264rgb", "pixelformat": "rgb24", "output_params": ["-crf", "0"]}
    else:
        _, height, width, _ = frames.shape
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        options |= {"codec": "libx264", "output_params": ["-crf", "16"]}
    with imageio.get_writer(path, format="FFMPEG", fps=fps, **options) as writer:
        for frame in frames:
            writer.append_data(frame)


def load(path: str | Path) -> np.ndarray:
    """The frames of an image or a video file; one frame for an image.

    Raises:
        ValueError: a file that is missing, or that cannot be read as an image or a video.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    import imageio.v3 as imageio

    plugin = "FFMPEG" if path.suffix.lower() == ".mp4" else "pillow"
    try:
        options = {} if plugin == "FFMPEG" else {"mode": "RGB"}
        frames = np.stack(list(imageio.imiter(path, plugin=plugin, **options)))
    except (OSError, ValueError, IndexError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]  # the rest is what ffmpeg says of itself
        raise ValueError(f"{path} cannot be read as an image or a video: {reason}") from error
    return frames


def side_by_side(panels: Sequence[np.ndarray], labels: Sequence[str]) -> np.ndarray:
    """Arranges equally sized pictures or videos in a row, each under its label (lines split at newlines)."""
    shapes = {panel.shape for panel in panels}
    if len(shapes) != 1 or len(panels) != len(labels):
        raise ValueError(
            f"panels of one shape and a label for each are needed, got {shapes}, {len(labels)} labels"
        )
    count, height, width, _ = panels[0].shape
    zoom = max(1, -(-MIN_PANEL // width))
    width, height = width * zoom, height * zoom
    size = max(13, width // 24)
    font = ImageFont.load_default(size)
    banner = (max(label.count("\n") for label in labels) + 1) * round(size * 1.35) + size // 2
    gap = size // 2
    canvas = Image.new("RGB", (len(panels) * (width + gap) - gap, height + banner), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for index, label in enumerate(labels):
        position = (index * (width + gap) + 2, size // 4)
        draw.multiline_text(position, label, fill=(20, 20, 20), font=font, spacing=size // 4)
    frames = np.repeat(np.asarray(canvas)[None], count, axis=0)
    for index, panel in enumerate(panels):
        left = index * (width + gap)
        frames[:, banner:, left : left + width] = panel.repeat(zoom, axis=1).repeat(zoom, axis=2)
    return frames
