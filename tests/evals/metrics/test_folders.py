"""Folders of pictures: what belongs to them, what cannot be measured, and results kept by content."""

import subprocess

import numpy as np
import pytest
from PIL import Image

from dit_accel import media
from dit_accel.evals.metrics.folders import Folder, Store, check_frames, choose, read
from dit_accel.files import digest


def picture(seed=0, shape=(24, 32, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_a_folder_holds_images_and_videos_by_name(tmp_path):
    for name in ("b.png", "a.JPG", "deep/c.png", ".hidden/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(picture()).save(tmp_path / name)
    (tmp_path / ".b-1x2y.png").write_bytes(b"half written")
    (tmp_path / "b.json").write_text("{}")
    folder = Folder.open(tmp_path)
    assert folder.names == ("a.JPG", "b.png", "deep/c.png")
    assert (len(folder), folder.jpegs) == (3, 1)


def test_folders_without_pictures_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        Folder.open(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no images or videos"):
        Folder.open(tmp_path)
    (tmp_path / "file.png").touch()
    with pytest.raises(ValueError, match="there is no folder"):
        Folder.open(tmp_path / "file.png")


def test_frames_are_chosen():
    video = np.arange(9)
    assert list(choose(video, "all")) == list(range(9))
    assert list(choose(video, "first")) == [0]
    assert list(choose(video, "middle")) == [4]
    assert list(choose(video, "3")) == [0, 4, 8]
    assert list(choose(video, "99")) == list(range(9))
    assert list(choose(video[:1], "middle")) == [0]
    for wrong in ("0", "-1", "last", "1.5", "", "²"):
        with pytest.raises(ValueError, match="frames are all, first, middle or a number"):
            check_frames(wrong)


def test_grey_and_palette_pictures_become_rgb(tmp_path):
    grey = picture(shape=(24, 32))
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(picture()).quantize(8).save(tmp_path / "palette.png")
    read_back = read(tmp_path / "grey.png")
    assert read_back.shape == (1, 24, 32, 3)
    assert all(np.array_equal(read_back[0, ..., channel], grey) for channel in range(3))
    assert read(tmp_path / "palette.png").shape == (1, 24, 32, 3)


def test_pictures_that_8_bit_rgb_cannot_show_are_refused(tmp_path):
    Image.fromarray(picture(shape=(8, 8)).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="more than 8 bits"):
        read(tmp_path / "deep.png")
    rgba = picture(shape=(8, 8, 4))
    Image.fromarray(rgba).save(tmp_path / "glass.png")
    with pytest.raises(ValueError, match="transparent in places"):
        read(tmp_path / "glass.png")
    rgba[..., 3] = 255
    Image.fromarray(rgba).save(tmp_path / "opaque.png")
    assert np.array_equal(read(tmp_path / "opaque.png")[0], rgba[..., :3])


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.mp4"])
@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_damaged_files_are_named(tmp_path, name, damage):
    path = tmp_path / name
    if name.endswith(("gif", "mp4")):
        media.save(path, np.stack([picture(seed, (64, 64, 3)) for seed in range(3)]))
    else:
        Image.fromarray(picture()).save(path)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"no picture", "cut": whole[: len(whole) // 2]}[damage])
    with pytest.raises(ValueError, match=f"{name} cannot be read") as error:
        read(path)
    assert len(str(error.value)) < 300, "ffmpeg's banner is not for users"


def test_a_video_without_frames_is_refused(tmp_path):
    import imageio_ffmpeg

    path = tmp_path / "empty.mp4"
    source = ["-f", "lavfi", "-i", "color=c=red:s=32x32:r=8"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", *source, "-t", "0", str(path)]
    subprocess.run(command, check=True)
    assert path.stat().st_size > 0
    with pytest.raises(ValueError, match=r"empty\.mp4 cannot be read"):
        read(path)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.png cannot be read"):
        digest(tmp_path / "none.png")


def test_a_store_computes_once_per_key(tmp_path):
    store, calls = Store(tmp_path), []

    def compute():
        calls.append(1)
        return np.array([1.5, np.inf])

    assert store.get(["a", 1], compute).tolist() == [1.5, np.inf]
    assert store.get(["a", 1], compute).tolist() == [1.5, np.inf]
    assert len(calls) == 1
    store.get(["a", 2], compute)
    Store(None).get(["a", 1], compute)
    assert len(calls) == 3


def test_an_interrupted_store_keeps_nothing_and_a_damaged_entry_is_named(tmp_path):
    store = Store(tmp_path)

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.get("key", interrupt)
    assert not list(tmp_path.rglob("*.npy"))
    store.get("key", lambda: np.zeros(3))
    (entry,) = tmp_path.rglob("*.npy")
    entry.write_bytes(entry.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"is damaged .* delete it"):
        store.get("key", lambda: np.zeros(3))
