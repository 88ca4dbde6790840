"""Files of masks: what is saved comes back; what is damaged or lies is refused before a kernel sees it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import damaged_masks
import pytest
import torch
from safetensors.torch import save

from dit_accel import BlockMask

SIZES = ("block_size", "seq_len", "kv_len", "text")


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "mask.safetensors"


@pytest.mark.parametrize("mask", damaged_masks.masks(), ids=["pattern", "chunk", "heads", "samples"])
def test_round_trip(mask, path):
    mask.save(path)
    loaded = BlockMask.load(path)
    assert [getattr(loaded, n) for n in SIZES] == [getattr(mask, n) for n in SIZES]
    assert loaded.tensors().keys() == mask.tensors().keys()
    assert all(torch.equal(x, mask.tensors()[name]) for name, x in loaded.tensors().items())
    assert loaded.is_trusted
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_other_files_are_refused(path):
    with pytest.raises(FileNotFoundError, match="no block mask file"):
        BlockMask.load(path)
    path.write_text("not a mask")
    with pytest.raises(ValueError, match="not a safetensors file"):
        BlockMask.load(path)
    path.write_bytes(save({"weight": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"not a block mask saved by dit-accel \(format None\)"):
        BlockMask.load(path)
    path.write_bytes(save({"tiles": torch.zeros(3)}, {"format": "dit-accel block mask 1"}))
    with pytest.raises(ValueError, match="saved by an earlier version of dit-accel; make the mask again"):
        BlockMask.load(path)


def contents():
    mask = damaged_masks.masks()[0]
    return {name: x.clone() for name, x in mask.tensors().items()}, {n: getattr(mask, n) for n in SIZES}


def test_any_byte_that_changes_is_noticed(path):
    data = damaged_masks.signed(*contents())
    for at in (*range(0, 60, 7), *range(len(data) - 900, len(data), 97)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(ValueError, match=r"checksum|not a safetensors file|is damaged|not a block mask"):
            BlockMask.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, f: t.update(more=torch.zeros(1)), "its tensors are .*'more'"),
        (lambda t, f: t.pop("partial.tile"), "its tensors are"),
        (lambda t, f: f.update(seq_len=170), r"is damaged: `full.start` must be .* of shape \(1, 6\)"),
        (lambda t, f: f.update(kv_len=40), "is damaged: `text` must be .* within the 40 keys"),
        (lambda t, f: f.update(kv_len="84"), "its fields are"),
        (lambda t, f: f.update(kv_len=True), "its fields are"),
        (lambda t, f: f.update(text=[63, 84, 90]), "its fields are"),
        (lambda t, f: f.update(device="cuda"), "its fields are .*cuda"),
        (lambda t, f: f.pop("text"), "its fields are"),
        (lambda t, f: f.update(block_size=(32, 2**40)), "`block_size` must be .*at most 4096"),
        (lambda t, f: f.update(seq_len=10**30, kv_len=10**30), "at most 2147483647 queries and keys"),
        (lambda t, f: t.update({"full.index": t["full.index"].float()}), "`full.index` must be torch.int32"),
        (lambda t, f: t["partial.index"].add_(1000), r"`partial.index` must be in 0 .. 5"),
        (lambda t, f: t["partial.count"].neg_(), "rows of `partial` must lie one after another"),
        (lambda t, f: t["order"].zero_(), "`order` must be a permutation"),
        (lambda t, f: t.update(head_groups=torch.ones(4).int()), r"`head_groups` must be in 0 .. 0"),
    ],
)
def test_contents_that_lie_under_a_checksum_that_fits(path, change, message):
    tensors, fields = contents()
    change(tensors, fields)
    path.write_bytes(damaged_masks.signed(tensors, fields))
    with pytest.raises(ValueError, match=message):
        BlockMask.load(path)


def test_damaged_files_are_refused_or_valid(tmp_path):
    found = damaged_masks.outcomes(tmp_path, range(400))
    assert set(found) <= {"refused", "attended", "too long", "no heads"}
    assert min(found["refused"], found["attended"]) > 10


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ and its AddressSanitizer")
def test_damaged_files_make_no_kernel_read_outside_its_inputs(tmp_path):
    """5,000 files, in a process of its own that AddressSanitizer and UBSan watch."""
    asked = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    library = Path(asked.stdout.strip())
    if not library.is_absolute():
        pytest.skip("g++ has no AddressSanitizer here")
    given = {
        "LD_PRELOAD": str(library),
        "ASAN_OPTIONS": "detect_leaks=0",
        "CXX": "g++",
        "OMP_NUM_THREADS": "1",
    }
    environment = {**os.environ, **given, "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def watched(*arguments):
        command = [sys.executable, damaged_masks.__file__, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    control = watched()
    assert control.returncode != 0
    assert "AddressSanitizer" in control.stderr
    run = watched(tmp_path, 0, 5000)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "Sanitizer" not in run.stderr
    found = json.loads(run.stdout)
    assert sum(found.values()) == 5000
    assert min(found["refused"], found["attended"]) > 100
