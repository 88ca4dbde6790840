"""What `media.load` takes and what it refuses: one rule for every format, and every error names the file."""

import struct
import subprocess
import zlib
from contextlib import contextmanager

import imageio_ffmpeg
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dit_accel import media

LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "BMP": {}, "GIF": {}}
ANIMATED = ("PNG", "WEBP", "GIF")


def picture(seed=0, height=24, width=32):
    """Few colours, so that a palette holds them."""
    return np.random.default_rng(seed).integers(0, 4, (height, width, 3), dtype=np.uint8) * 85


def ffmpeg(*arguments, content=None):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *map(str, arguments)]
    subprocess.run(command, input=content, check=True)


def mp4(path, frames, pixels, *encode):
    """`frames` in raw `pixels`, uint8 or uint16 (frames, height, width, channels), as encoded by `encode`."""
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    raw = ("-f", "rawvideo", "-pix_fmt", pixels, "-s", size, "-r", 8, "-i", "-")
    ffmpeg(*raw, *encode, path, content=frames.tobytes())


def png(path, depth, kind, rows, size=None):
    """A PNG of any bit depth and colour type; Pillow writes no colours of 16 bits."""

    def chunk(name, content):
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    height, width = size or rows.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    content = b"".join(b"\0" + row.astype(f">u{max(1, depth // 8)}").tobytes() for row in rows)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def refused(path, reason):
    with pytest.raises(ValueError, match=reason) as error:
        media.load(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 400


@contextmanager
def named(path):
    """Swallows a ValueError that names the file, and nothing else."""
    try:
        yield
    except ValueError as error:
        if str(path) not in str(error):
            raise


# -- one rule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSLESS)
def test_opaque_pictures_are_read_exactly(tmp_path, kind):
    image = Image.fromarray(picture())
    path = tmp_path / f"a.{kind.lower()}"
    (image.quantize(dither=Image.Dither.NONE) if kind == "GIF" else image).save(path, **LOSSLESS[kind])
    assert np.array_equal(media.load(path), picture()[None])


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_alpha_channel_without_transparency_is_left_out(tmp_path, kind):
    image = Image.fromarray(picture())
    image.putalpha(255)
    image.save(tmp_path / "a", format=kind, **LOSSLESS[kind])
    assert np.array_equal(media.load(tmp_path / "a"), picture()[None])


@pytest.mark.parametrize("kind", ANIMATED)
@pytest.mark.parametrize("frames", [1, 3])
def test_transparency_of_any_pixel_in_any_frame_is_refused(tmp_path, kind, frames):
    images = [Image.fromarray(picture(seed)).convert("RGBA") for seed in range(frames)]
    pixels = np.array(images[-1])
    pixels[5, 7, 3] = 0
    images[-1] = Image.fromarray(pixels)
    rest = {"save_all": True, "append_images": images[1:], "duration": 100, "disposal": 2}
    images[0].save(tmp_path / "a", format=kind, **LOSSLESS[kind], **(rest if frames > 1 else {}))
    refused(tmp_path / "a", "transparent in places")


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_a_colour_that_means_transparent_is_refused(tmp_path, mode):
    image = Image.fromarray(picture()).convert(mode)
    colour = image.getpixel((3, 4))
    image.save(tmp_path / "a.png", transparency=colour)
    refused(tmp_path / "a.png", "transparent in places")
    unused = (1, 2, 3) if mode == "RGB" else min(set(range(256)).difference(image.tobytes()))
    image.save(tmp_path / "b.png", transparency=unused)
    assert np.array_equal(media.load(tmp_path / "b.png")[0], np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("alpha", [255, 254])
def test_videos_with_an_alpha_channel(tmp_path, alpha):
    frames = np.stack([np.dstack([picture(seed), np.full((24, 32), 255, np.uint8)]) for seed in range(3)])
    frames[2, 3, 4, 3] = alpha
    mp4(tmp_path / "a.mp4", frames, "rgba", "-c:v", "png")
    if alpha < 255:
        return refused(tmp_path / "a.mp4", "transparent in places")
    assert np.array_equal(media.load(tmp_path / "a.mp4"), frames[..., :3])


@pytest.mark.parametrize(
    ("kind", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)], ids=["L", "RGB", "LA", "RGBA"]
)
def test_16_bit_pictures_are_refused_in_grey_and_in_colour(tmp_path, kind, channels):
    png(tmp_path / "a.png", 16, kind, np.full((8, 9, channels), 40_000, np.uint16))
    refused(tmp_path / "a.png", "more than 8 bits per channel")
    png(tmp_path / "b.png", 8, kind, np.full((8, 9, channels), 255, np.uint8))
    assert (media.load(tmp_path / "b.png") == 255).all()


@pytest.mark.parametrize(
    "encode",
    [
        ("-c:v", "libx264", "-pix_fmt", "yuv420p10le"),
        ("-c:v", "libx265", "-x265-params", "log-level=0", "-pix_fmt", "yuv444p12le"),
        ("-c:v", "png", "-pix_fmt", "rgb48be"),
        ("-c:v", "libx264", "-pix_fmt", "gray10le"),
    ],
    ids=lambda encode: f"{encode[1]}-{encode[-1]}",
)
def test_videos_of_more_than_8_bits_are_refused(tmp_path, encode):
    mp4(tmp_path / "a.mp4", np.full((2, 32, 32, 3), 99, np.uint8), "rgb24", *encode)
    refused(tmp_path / "a.mp4", "more than 8 bits per channel")


def test_few_bits_grey_and_palettes_become_rgb(tmp_path):
    for mode in ("1", "L", "P"):
        image = Image.fromarray(picture()).convert(mode)
        for suffix in ("png", "bmp"):
            image.save(tmp_path / f"a.{suffix}")
            assert np.array_equal(media.load(tmp_path / f"a.{suffix}")[0], np.asarray(image.convert("RGB")))
    Image.new("L", (16, 8), 77).save(tmp_path / "grey.jpg")
    assert (media.load(tmp_path / "grey.jpg") == 77).all()


def test_cmyk_is_refused(tmp_path):
    Image.fromarray(picture()).convert("CMYK").save(tmp_path / "ink.jpg")
    refused(tmp_path / "ink.jpg", "CMYK; convert it to RGB")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_turned_as_exif_says(tmp_path, kind, orientation):
    """Corners of four colours, each a quarter, arrive where the orientation puts them."""
    quarters = np.array([[10, 90], [170, 250]], np.uint8)
    shown = {
        1: quarters, 2: quarters[:, ::-1], 3: quarters[::-1, ::-1], 4: quarters[::-1],
        5: quarters.T, 6: np.rot90(quarters, -1), 7: quarters[::-1, ::-1].T, 8: np.rot90(quarters),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(quarters.repeat(16, 0).repeat(32, 1)).convert("RGB")
    image.save(tmp_path / "a", format=kind, exif=exif, quality=100)
    loaded = media.load(tmp_path / "a")[0]
    assert loaded.shape == ((32, 64, 3) if orientation < 5 else (64, 32, 3))
    height, width, _ = loaded.shape
    corners = loaded[height // 4 :: height // 2, width // 4 :: width // 2, 0]
    assert np.abs(corners.astype(int) - shown).max() < 5


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_videos_are_turned_as_their_track_says(tmp_path, degrees):
    video = np.zeros((3, 32, 64, 3), np.uint8)
    video[:, :16, :16] = 255
    media.save(tmp_path / "plain.mp4", video, lossless=True)
    turned = (
        "-display_rotation",
        degrees,
        "-i",
        tmp_path / "plain.mp4",
        "-c",
        "copy",
        tmp_path / "turned.mp4",
    )
    ffmpeg(*turned)
    assert np.array_equal(media.load(tmp_path / "turned.mp4"), np.rot90(video, degrees // 90, axes=(1, 2)))


# -- which frames --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preview", [(32, 24), (8, 6), (64, 64)])
def test_the_first_picture_of_a_jpeg_counts(tmp_path, preview):
    """Phones put previews and depth maps behind it: MPO."""
    image = Image.fromarray(picture())
    image.save(tmp_path / "plain.jpg", quality=95)
    options = {"format": "MPO", "quality": 95, "save_all": True}
    others = [Image.new("RGB", preview), Image.new("L", preview).convert("RGB")]
    image.save(tmp_path / "phone.jpg", append_images=others, **options)
    assert getattr(Image.open(tmp_path / "phone.jpg"), "n_frames", 1) == 3
    assert np.array_equal(media.load(tmp_path / "phone.jpg"), media.load(tmp_path / "plain.jpg"))


@pytest.mark.parametrize("kind", ANIMATED)
@pytest.mark.parametrize("duration", [100, [40, 1000, 20, 500]], ids=["even", "uneven"])
def test_animations_have_the_frames_that_are_shown(tmp_path, kind, duration):
    frames = np.stack([picture(seed) for seed in range(4)])
    frames[2] = frames[1]
    frames[2, :3] = 255 - frames[2, :3]  # most of it unchanged: stored as transparent by those who write GIFs
    images = [Image.fromarray(frame) for frame in frames]
    options = LOSSLESS[kind] | {"save_all": True, "append_images": images[1:], "duration": duration}
    images[0].save(tmp_path / "a", format=kind, **options)
    assert np.array_equal(media.load(tmp_path / "a"), frames)


def test_a_picture_for_viewers_without_animation_is_no_frame(tmp_path):
    frames = [Image.fromarray(picture(seed)) for seed in range(4)]
    options = {"save_all": True, "append_images": frames[1:], "duration": 100, "default_image": True}
    frames[0].save(tmp_path / "a.png", **options)
    assert np.array_equal(media.load(tmp_path / "a.png"), np.stack([picture(seed) for seed in (1, 2, 3)]))


@pytest.mark.parametrize(
    "timing",
    [
        "setpts='if(lt(N,6),N,N*3-12)/8/TB'",
        "setpts='N*N/8/TB'",
        "setpts='(N+5)/8/TB'",
        "setpts='(N+random(0)*0.8)/8/TB'",
    ],
    ids=["a-gap", "slower-and-slower", "late", "jitter"],
)
@pytest.mark.parametrize("coded", [2, 12, 17])
def test_coded_frames_of_a_video_are_read_once(tmp_path, timing, coded):
    frames = np.stack([np.full((32, 48, 3), 15 * index, np.uint8) for index in range(coded)])
    encode = ("-vf", timing, "-fps_mode", "vfr", "-c:v", "libx264rgb", "-crf", 0, "-bf", 0)
    mp4(tmp_path / "a.mp4", frames, "rgb24", "-enc_time_base", "1/1000", *encode)
    assert np.array_equal(media.load(tmp_path / "a.mp4"), frames)


def test_sound_and_a_cover_do_not_count(tmp_path):
    frames = np.stack([picture(seed, 32, 48) for seed in range(5)])
    media.save(tmp_path / "v.mp4", frames, lossless=True)
    Image.fromarray(picture(9, 96, 96)).save(tmp_path / "cover.png")
    inputs = ("-f", "lavfi", "-i", "sine=d=2", "-i", tmp_path / "cover.png", "-itsoffset", 0.7)
    streams = (
        "-map",
        0,
        "-map",
        1,
        "-map",
        2,
        "-c:v",
        "copy",
        "-c:a",
        "aac",
        "-disposition:v:0",
        "attached_pic",
    )
    ffmpeg(*inputs, "-i", tmp_path / "v.mp4", *streams, tmp_path / "all.mp4")
    assert np.array_equal(media.load(tmp_path / "all.mp4"), frames)


# -- files that lie ------------------------------------------------------------------------------------------


def test_content_counts_and_not_the_suffix(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.mp4", format="PNG")
    assert np.array_equal(media.load(tmp_path / "a.mp4"), picture()[None])
    frames = np.stack([picture(seed, 32, 48) for seed in range(2)])
    media.save(tmp_path / "b.mp4", frames, lossless=True)
    (tmp_path / "b.mp4").rename(tmp_path / "b.png")
    assert np.array_equal(media.load(tmp_path / "b.png"), frames)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "mp4"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"\n", "cannot be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read"),
        (b"#EXTM3U\n#EXTINF:1,\nother.mp4\n", "cannot be read"),
        (b"ffconcat version 1.0\nfile other.mp4\n", "cannot be read"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf", "HEIC or AVIF"),
        (b"II*\0\x08\0\0\0\0\0\0\0\0\0", "cannot be read"),
    ],
    ids=["empty", "newline", "eps", "playlist", "concat", "avif", "tiff"],
)
def test_other_files_are_refused_by_name(tmp_path, suffix, content, reason):
    media.save(tmp_path / "other.mp4", np.stack([picture(), picture(1)]))
    (tmp_path / f"a.{suffix}").write_bytes(content)
    refused(tmp_path / f"a.{suffix}", reason)


@pytest.mark.parametrize("size", [(20_000, 10_000), (2**31 - 1, 2**31 - 1)])
def test_pictures_beyond_the_limit_are_refused_before_they_are_decoded(tmp_path, size):
    png(tmp_path / "huge.png", 1, 0, np.zeros((1, 1)), size)
    refused(tmp_path / "huge.png", "178956970 pixels")


@pytest.mark.parametrize("kind", [*ANIMATED, "JPEG", "BMP", "MP4"])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, kind):
    path = tmp_path / "cut.mp4"
    frames = [picture(seed, 32, 48) for seed in range(4)]
    if kind == "MP4":
        media.save(tmp_path / "whole.mp4", np.stack(frames))
        ffmpeg("-i", tmp_path / "whole.mp4", "-c", "copy", "-movflags", "faststart", path)
    else:
        rest = {"save_all": True, "append_images": [Image.fromarray(one) for one in frames[1:]]}
        Image.fromarray(frames[0]).save(path, format=kind, **(rest if kind in ANIMATED else {}))
    whole = path.read_bytes()
    assert len(media.load(path)) == (1 if kind in ("JPEG", "BMP") else 4)
    for end in sorted({1, 10, *np.linspace(12, len(whole) - 13, 8 if kind == "MP4" else 60, dtype=int)}):
        path.write_bytes(whole[:end])
        refused(path, "cannot be read as an image or a video")


@pytest.mark.parametrize("kind", [*ANIMATED, "JPEG", "BMP", "MP4"])
def test_damage_is_read_or_refused_by_name(tmp_path_factory, kind):
    path = tmp_path_factory.mktemp("damage") / "a.mp4"
    frames = [picture(seed, 32, 48) for seed in range(3)]
    if kind == "MP4":
        media.save(path, np.stack(frames))
    else:
        rest = {"save_all": True, "append_images": [Image.fromarray(one) for one in frames[1:]]}
        Image.fromarray(frames[0]).save(path, format=kind, **(rest if kind in ANIMATED else {}))
    whole = path.read_bytes()

    # MP4 is read by another process; WebP of a damaged size is decoded before it is refused
    @settings(max_examples={"MP4": 15, "WEBP": 40}.get(kind, 150), deadline=None)
    @given(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), min_size=1, max_size=20))
    def check(changes):
        content = bytearray(whole)
        for position, value in changes:
            content[position] = value
        path.write_bytes(content)
        with named(path):
            read = media.load(path)
            assert (read.dtype, read.ndim, read.shape[-1]) == (np.uint8, 4, 3)

    check()


def test_damaged_pixels_of_a_png_are_refused(tmp_path):
    """Its checksums tell; decoding alone would show other pixels."""
    Image.fromarray(picture()).save(tmp_path / "a.png", compress_level=0)
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.png").write_bytes(content)
    refused(tmp_path / "a.png", "cannot be read")
