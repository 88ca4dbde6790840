"""The frames of a GIF laid over each other as viewers do, transparency preserved.

Pillow and ffmpeg paint a background colour where a frame is cleared, and viewers show what lies behind.

Source: GIF89a specification (CompuServe, 1990); cleared to the background is transparent, as in browsers.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image

EXTENSION, IMAGE, END = 0x21, 0x2C, 0x3B  # kinds of blocks
CONTROL = 0xF9  # the extension that says how the next image is laid
TO_BACKGROUND, TO_PREVIOUS = 2, 3  # what becomes of an image when the next one comes


def frames(content: bytes) -> Iterator[np.ndarray]:
    """Yields uint8 (height, width, 4), one for each image of a GIF file.

    Raises:
        ValueError: content that is cut off or damaged; what Pillow raises where pixels cannot be decoded.
    """
    try:
        yield from _frames(content)
    except (IndexError, struct.error):
        raise ValueError("it is cut off") from None


def _frames(content: bytes) -> Iterator[np.ndarray]:
    width, height, flags = struct.unpack_from("<HHB", content, 6)
    canvas = np.zeros((height, width, 4), np.uint8)
    position = 13 + _palette_bytes(flags)
    start, control = content[:position], b""
    while content[position] != END:
        block = position
        if content[position] == EXTENSION:
            label, position = content[position + 1], _after_data(content, position + 2)
            control = content[block:position] if label == CONTROL else control
            continue
        if content[position] != IMAGE:
            raise ValueError(f"it is damaged: at offset {position} no block of a GIF begins")
        left, top, columns, rows, flags = struct.unpack_from("<4HB", content, position + 1)
        position = _after_data(content, position + 11 + _palette_bytes(flags))
        pixels = _decode(start, control, columns, rows, content[block + 9 : position])
        before, area = canvas.copy(), canvas[top : top + rows, left : left + columns]
        pixels = pixels[: area.shape[0], : area.shape[1]]
        area[...] = np.where(pixels[..., 3:] > 0, pixels, area)
        yield canvas.copy()
        disposal = control[3] >> 2 & 7 if control else 0
        if disposal == TO_BACKGROUND:
            area[...] = 0
        elif disposal == TO_PREVIOUS:
            canvas = before
        control = b""


def _palette_bytes(flags: int) -> int:
    """The length of the palette that follows a header with these flags."""
    return 3 << (flags & 7) + 1 if flags & 128 else 0


def _after_data(content: bytes, position: int) -> int:
    """Where a chain of data blocks ends that begins at `position`."""
    while length := content[position]:
        position += length + 1
    return position + 1


def _decode(start: bytes, control: bytes, columns: int, rows: int, rest: bytes) -> np.ndarray:
    """One image, uint8 (rows, columns, 4), as a GIF file of its own."""
    size = struct.pack("<HH", columns, rows)
    alone = start[:6] + size + start[10:] + control + struct.pack("<BHH", IMAGE, 0, 0) + size + rest
    with Image.open(io.BytesIO(alone + bytes([END])), formats=("GIF",)) as image:
        return np.asarray(image.convert("RGBA"))
