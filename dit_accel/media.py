"""Reading, writing and arranging images and videos as uint8 arrays of shape (frames, height, width, 3)."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from . import gif_frames
from .files import atomic
from .optional import required

IMAGE_SUFFIXES = (".png",)
VIDEO_SUFFIXES = (".mp4", ".gif", ".png")
STRIP_FRAMES = 6  # a video written as PNG becomes a strip of this many frames, first and last included
SHEET_FRAMES = 3  # frames of a video on a contact sheet: the first, middle and last
SHEET_PIXELS = 128  # width of each picture on it
BACKGROUND = (255, 255, 255)
MIN_PANEL = 256  # pixels; smaller pictures are enlarged by whole factors so that a label fits

TOO_DEEP = "it has more than 8 bits per channel; convert it first"
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # some others of Pillow's call programs
_HEIF = (b"hei", b"hev", b"mif", b"msf", b"avi")  # how the brands of its files begin
_PIXELS = "rgb24|rgba|rgb48be|rgba64be"
_PAM = re.compile(  # netpbm's PAM: pixels after a header that says what they are
    rb"P7\nWIDTH (\d+)\nHEIGHT (\d+)\nDEPTH (\d)\nMAXVAL (\d+)\nTUPLTYPE \w+\nENDHDR\n"
)


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


def to_uint8(array: np.ndarray) -> np.ndarray:
    """Floats in [0, 1], as pipelines return them, to uint8; not-a-number raises instead of turning black."""
    if array.dtype == np.uint8:
        return array
    if not np.isfinite(array).all():
        raise ValueError("the model returned values that are not finite: nothing to show")
    return (array.clip(0, 1) * 255).round().astype(np.uint8)


def one_colour(frames: np.ndarray) -> bool:
    """Whether every frame is of a single colour, such as black: distances to it and from it say nothing."""
    return bool((frames == frames[:, :1, :1]).all())


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
    imageio = required("imageio.v2", "writing MP4", "cli")
    required("imageio_ffmpeg", "writing MP4", "cli")
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
    """The frames of an image or a video file as viewers show them, uint8 (frames, height, width, 3).

    PNG, JPEG, WebP, BMP, GIF and MP4, by what the file holds and not by its suffix. One rule for every format
    and every frame:

    - 8 bits per channel: more are refused, and so is CMYK, which looks as its inks do.
    - Opaque: transparency in any pixel is refused, an alpha channel without any is left out.
    - Grey, black and white, and palettes become RGB; colour profiles are not applied.
    - Turned as EXIF or the video's rotation says.
    - Each frame that is shown, once, however long it is shown. Previews and depth maps that phones put behind
      the first picture of a JPEG are no frames, nor is an image for viewers that cannot show an animated PNG.
    - Whole: a file that is cut off or damaged is refused, as far as its format and decoder can tell.
    - No more pixels than Pillow takes (`2 * PIL.Image.MAX_IMAGE_PIXELS`, 178,956,970 unless set).

    Raises:
        ValueError: naming the file and which of these it is, or a file that is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        frames = np.stack(_decode(path))
        if frames.shape[-1] == 4 and frames[..., 3].min() < 255:
            raise ValueError("it is transparent in places; put it on a background first")
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} cannot be read as an image or a video: {reason}") from error
    return np.ascontiguousarray(frames[..., :3])


def _decode(path: Path) -> list[np.ndarray]:
    """Frames, uint8 (height, width, 3 or 4)."""
    with path.open("rb") as file:
        head = file.read(32)
    if not head:
        raise ValueError("it is empty")
    if head.startswith(b"\x89PNG") and head[24:25] > b"\x08":  # Pillow would keep the upper 8 bits
        raise ValueError(TOO_DEEP)
    try:
        with Image.open(path, formats=_FORMATS) as image:
            image.verify()  # size, and the checksums of a PNG, which decoding passes over
    except UnidentifiedImageError:
        boxes = head[4:8] == b"ftyp"
        if boxes and head[8:11] in _HEIF:  # ffmpeg would give one tile of it
            raise ValueError("it is HEIC or AVIF; convert it to PNG first") from None
        if boxes or path.suffix.lower() == ".mp4":
            return _decode_mp4(path)
        raise ValueError(
            f"it is neither {', '.join(_FORMATS)} nor MP4, or its beginning is damaged"
        ) from None
    if head.startswith(b"GIF"):
        return list(gif_frames.frames(path.read_bytes()))
    with Image.open(path, formats=_FORMATS) as image:
        return list(_decode_pictures(image))


def _decode_pictures(image: Image.Image) -> Iterator[np.ndarray]:
    if image.mode == "CMYK":
        raise ValueError("its colours are CMYK; convert it to RGB first")
    several = image.format not in ("JPEG", "MPO") and getattr(image, "is_animated", False)
    first = int(several and getattr(image, "default_image", False))
    for index in range(first, image.n_frames if several else 1):
        image.seek(index)
        yield np.asarray(ImageOps.exif_transpose(image).convert("RGBA"))


def _decode_mp4(path: Path) -> list[np.ndarray]:
    """Each frame of the first video track, in the first of `_PIXELS` that loses nothing of it.

    Only ffmpeg's reader of MP4 is used, on this file alone, whatever else the content asks for.
    """
    imageio_ffmpeg = required("imageio_ffmpeg", "reading MP4", "cli")
    read = ["-xerror", "-protocol_whitelist", "file", "-f", "mp4", "-i", f"file:{path}", "-map", "0:V:0"]
    give = ["-fps_mode", "passthrough", "-vf", f"format={_PIXELS}", "-c:v", "pam", "-f", "image2pipe", "-"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", *read, *give]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise ValueError(re.sub(r"^(\[[^]]*\] )+", "", done.stderr.decode(errors="replace")))
    frames, position = [], 0
    while position < len(done.stdout):
        header = _PAM.match(done.stdout, position)
        width, height, channels, largest = map(int, header.groups())
        if largest > 255:
            raise ValueError(TOO_DEEP)
        pixels = np.frombuffer(done.stdout, np.uint8, height * width * channels, header.end())
        frames.append(pixels.reshape(height, width, channels))
        position = header.end() + pixels.size
    if not frames:
        raise ValueError("it holds no frame")
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


def beside(samples: np.ndarray) -> np.ndarray:
    """Samples (B, H, W, 3) in a row, (H, B * W, 3); a video (T, H, W, 3) is a column of `SHEET_FRAMES`."""
    if samples.ndim == 5:
        last = samples.shape[1] - 1
        picks = np.linspace(0, last, min(last + 1, SHEET_FRAMES)).round().astype(int)
        samples = np.concatenate([samples[:, frame] for frame in picks], axis=1)
    return np.concatenate(list(samples), axis=1)


def contact_sheet(samples: np.ndarray) -> np.ndarray:
    """Pictures (n, H, W, 3) or videos (n, T, H, W, 3) of floats in a row, a video as a column of frames."""
    sheet, width = Image.fromarray(beside(to_uint8(samples))), SHEET_PIXELS * len(samples)
    return np.asarray(
        sheet.resize((width, round(width * sheet.height / sheet.width)), Image.Resampling.LANCZOS)
    )
