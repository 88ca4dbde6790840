"""Calibrations and their files: what is saved comes back, and what is damaged or lies is refused."""

import dataclasses
import pickle

import calibrations
import pytest
import torch
from safetensors.torch import save

from dit_accel import Calibration, tensor_files
from dit_accel.patterns import ChunkCausal, Clear, Dense, Neighborhood, Radial
from dit_accel.patterns.calibration import FORMAT

GRID = (3, 5, 6)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "calibration.safetensors"


def made(**options):
    patterns = (Dense(), Neighborhood((3, 3, 3)), Radial(0.2, 16), Clear(2))
    return calibrations.drawn(GRID, patterns=patterns, **options)


def test_round_trip(path):
    calibration = dataclasses.replace(made(), about={"prompts": ["a", "b"], "seed": 0})
    calibration.save(path)
    loaded = Calibration.load(path)
    assert loaded == calibration
    assert loaded.about == calibration.about
    assert loaded.file() == str(path)
    assert all(
        loaded.choices(layer, head) == calibration.choices(layer, head)
        for layer in range(2)
        for head in range(4)
    )
    assert made(seed=1) != calibration
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_counts_are_of_all_heads_and_rows():
    calibration = made()
    assert sum(calibration.counts().values()) == 2 * 2 * 4
    assert {name.removesuffix(" with a tail") for name in calibration.counts()} > {"Dense"}
    assert "grid (3, 5, 6)" in repr(calibration)


class Opens:
    """Whose pickle would run code."""

    def __reduce__(self):
        return (print, ("it ran",))


def test_other_files_are_refused(path, capsys):
    with pytest.raises(FileNotFoundError, match="no calibration file"):
        Calibration.load(path)
    for content in (pickle.dumps(Opens()), b"", b"not a calibration"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a safetensors file"):
            Calibration.load(path)
    torch.save({"chosen": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a safetensors file"):
        Calibration.load(path)
    path.write_bytes(save({"chosen": torch.zeros(3)}, {"format": "dit-accel calibration 0"}))
    with pytest.raises(ValueError, match="saved by an earlier version of dit-accel; make the calibration"):
        Calibration.load(path)
    path.write_bytes(save({"chosen": torch.zeros(3)}, {"format": "dit-accel block mask 2"}))
    with pytest.raises(ValueError, match="is not a calibration saved by dit-accel"):
        Calibration.load(path)
    assert "it ran" not in capsys.readouterr().out


def test_a_file_cut_anywhere_is_refused(path):
    made().save(path)
    data = path.read_bytes()
    for length in range(0, len(data), 61):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="not a safetensors file"):
            Calibration.load(path)


def test_any_byte_that_changes_is_noticed(path):
    made().save(path)
    data = path.read_bytes()
    for at in (*range(0, 200, 7), *range(200, len(data), 61)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(ValueError, match=r"checksum|not a safetensors file|is damaged|not a calibration"):
            Calibration.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, f: t.update(more=torch.zeros(1)), "its tensors are .*'more'"),
        (lambda t, f: t.pop("place"), "its tensors are"),
        (lambda t, f: f.pop("grid"), "is damaged: 'grid'"),
        (lambda t, f: f.update(grid=[3, 5]), "`grid` must be three positive integers"),
        (lambda t, f: f.update(grid=[3000, 5000, 6000]), "must be at most .* tokens"),
        (lambda t, f: f.update(grid=[3, 5, 60]), r"`blocks` must be torch.uint8 \(.*, got"),
        (lambda t, f: f.update(heads=5), r"`chosen` must have shape \(rows, 2, 5\)"),
        (lambda t, f: f.update(heads=True), "`heads` must be an integer"),
        (lambda t, f: f.update(steps=0), "`steps` must be an integer"),
        (lambda t, f: f.update(steps=10**30), "`steps` must be an integer"),
        (lambda t, f: f.update(density=2), "`density` must be a number above 0"),
        (lambda t, f: f.update(stretches=[0, 2]), r"`stretches` must be rows in 0 .. 1"),
        (lambda t, f: f.update(layers=["a", "a"]), "`layers` must be different names"),
        (lambda t, f: f.update(patterns=["Dense"]), "`chosen` must be in -1 .. 0"),
        (lambda t, f: f.update(patterns=["os.system"] * 4), "unknown pattern 'os.system'"),
        (lambda t, f: f.update(patterns=["Routed"] * 4), "unknown pattern 'Routed'"),
        (lambda t, f: f.update(device="cuda"), "unexpected keyword argument 'device'"),
        (lambda t, f: t["chosen"].add_(9), r"`chosen` must be in -1 .. 3"),
        (lambda t, f: t["order"].add_(6), r"`order` must be in 0 .. 5"),
        (lambda t, f: t["place"].add_(1), r"`place` must be in"),
        (lambda t, f: t["place"].fill_(0), "`place` must name blocks of those heads"),
        (lambda t, f: t["blocks"].zero_(), "every block's attention to itself"),
        (lambda t, f: t.update(tail=t["tail"].int()), r"`tail` must be torch.bool"),
    ],
)
def test_contents_that_lie_under_a_checksum_that_fits(path, change, message):
    calibration = made()
    tensors = {name: x.clone() for name, x in calibration.tensors.items()}
    fields = dict(calibration.fields)
    change(tensors, fields)
    tensor_files.write(path, FORMAT, tensors, fields)
    with pytest.raises(ValueError, match=message):
        Calibration.load(path)


def test_what_it_may_hold():
    with pytest.raises(ValueError, match="`patterns` must be static patterns"):
        dataclasses.replace(made(), patterns=("Dense",))
    assert "ChunkCausal" not in Calibration.load.__globals__["STATIC"]  # which hides frames on purpose
    assert ChunkCausal(2).hides
