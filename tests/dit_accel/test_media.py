"""Round trips through files, the side-by-side picture, and files that are not media."""

import numpy as np
import pytest

from dit_accel import media


def moving_square(frames=5, height=48, width=64):
    """A white square that moves right over a grey ramp: no two frames are equal."""
    video = np.repeat(np.linspace(40, 120, width).astype(np.uint8)[None, None, :, None], height, axis=1)
    video = np.repeat(np.repeat(video, frames, axis=0), 3, axis=3)
    for index in range(frames):
        video[index, 16:32, 8 * index : 8 * index + 16] = 255
    return video


def test_png_is_exact(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (1, 33, 47, 3), dtype=np.uint8)
    assert np.array_equal(media.load(media.save(tmp_path / "image.png", image)), image)


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
@pytest.mark.parametrize("frames", [2, 5, 29])
def test_video_keeps_frames_and_looks(tmp_path, suffix, frames):
    video = moving_square(frames, width=300)
    loaded = media.load(media.save(tmp_path / f"video{suffix}", video))
    assert loaded.shape == video.shape
    assert np.abs(loaded.astype(int) - video).mean() < 4


def test_mp4_pads_odd_sizes(tmp_path):
    loaded = media.load(media.save(tmp_path / "odd.mp4", moving_square(3, height=49, width=63)))
    assert loaded.shape == (3, 50, 64, 3)


def test_lossless_mp4_is_exact_at_any_size(tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (3, 33, 47, 3), dtype=np.uint8)
    assert np.array_equal(media.load(media.save(tmp_path / "video.mp4", video, lossless=True)), video)


def test_video_as_png_is_a_strip(tmp_path):
    video = moving_square(9)
    loaded = media.load(media.save(tmp_path / "strip.png", video))
    assert loaded.shape == (1, 48, 64 * media.STRIP_FRAMES, 3)
    assert np.array_equal(loaded[0, :, :64], video[0])
    assert np.array_equal(loaded[0, :, -64:], video[-1])


@pytest.mark.parametrize(("name", "frames"), [("a.jpg", 1), ("a.mp4", 1), ("a", 1), ("a.avi", 3)])
def test_refuses_suffix_and_leaves_nothing(tmp_path, name, frames):
    with pytest.raises(ValueError, match="is written as"):
        media.save(tmp_path / name, moving_square(frames))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["broken.png", "broken.gif", "broken.mp4"])
@pytest.mark.parametrize("content", [b"", b"this is not a picture"], ids=["empty", "text"])
def test_unreadable_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read"):
        media.load(tmp_path / name)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        media.load(tmp_path / "none.png")


def test_to_uint8():
    assert media.to_uint8(np.array([-1.0, 0.0, 0.5, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]
    with pytest.raises(ValueError, match="not finite"):
        media.to_uint8(np.array([0.5, np.nan]))


def test_one_colour():
    plain = np.full((3, 8, 9, 3), (1, 2, 3), np.uint8)
    assert media.one_colour(plain)
    assert media.one_colour(plain * np.arange(3, dtype=np.uint8)[:, None, None, None])
    plain[2, 7, 8, 1] += 1
    assert not media.one_colour(plain)


@pytest.mark.parametrize("size", [(64, 64), (300, 400)], ids=["enlarged", "as-is"])
def test_side_by_side(size):
    height, width = size
    panels = [moving_square(3, height, width), moving_square(3, height, width) // 2]
    picture = media.side_by_side(panels, ["dense\n1.0 s per step", "radial"])
    zoom = picture.shape[2] // 2 // width
    assert picture.shape[2] >= 2 * media.MIN_PANEL
    assert len(picture) == 3
    below = picture[:, -height * zoom :: zoom, ::zoom]
    assert np.array_equal(below[:, :, :width], panels[0])
    assert np.array_equal(picture[:, -height * zoom :: zoom, -width * zoom :: zoom], panels[1])
    assert picture[:, : -height * zoom].min() < 100, "the labels are drawn"


def test_side_by_side_refuses_different_sizes():
    with pytest.raises(ValueError, match="one shape"):
        media.side_by_side([moving_square(3), moving_square(2)], ["a", "b"])


def test_sheet_pictures_lie_beside_each_other():
    dark, bright = np.zeros((64, 64, 3)), np.ones((64, 64, 3))
    sheet = media.contact_sheet(np.stack([dark, bright]))
    assert sheet.shape == (128, 256, 3)
    assert sheet[:, :120].max() == 0
    assert sheet[:, 136:].min() == 255


def test_a_video_is_its_first_middle_and_last_frame():
    video = np.broadcast_to(np.linspace(0, 1, 5)[:, None, None, None], (5, 64, 64, 3))
    sheet = media.contact_sheet(video[None])
    assert sheet.shape == (384, 128, 3)
    assert [int(sheet[row, 64, 0]) for row in (64, 192, 320)] == [0, 128, 255]
