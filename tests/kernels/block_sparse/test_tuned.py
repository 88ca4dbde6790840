"""The table of measured launches: written, read back, used by the kernel, refused when damaged."""

import dataclasses
import json

import pytest
import torch

from dit_accel.kernels.block_sparse import triton, triton_configs, tuned

ENTRY = tuned.Entry(
    "9.0", 2, 128, 64, 32, 4, 3,
    gain=1.25, gpu="a GPU", torch="2.11.0", triton="3.6.0", cuda="12.8", commit="abc",
)  # fmt: skip


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The file that the kernel reads, empty."""
    path = tmp_path / "tuned.json"
    monkeypatch.setattr(tuned, "PATH", path)
    tuned._read.cache_clear()
    yield path
    tuned._read.cache_clear()


def write(path, **change):
    path.write_text(json.dumps({"entries": [dataclasses.asdict(ENTRY) | change]}))


def test_written_and_read_back(table):
    other = dataclasses.replace(ENTRY, head_dim=64, stages=5)
    tuned.save(table, [ENTRY, other])
    assert tuned.load(table) == {((9, 0), 2, 128): ENTRY, ((9, 0), 2, 64): other}
    newer = dataclasses.replace(ENTRY, warps=8)
    tuned.save(table, [newer])
    assert tuned.load(table) == {((9, 0), 2, 128): newer, ((9, 0), 2, 64): other}
    assert [path.name for path in table.parent.iterdir()] == [table.name]


def test_nothing_is_measured_without_a_file(table):
    assert tuned.load(table) == {}
    assert tuned.find((9, 0), 2, 128) is None


def test_an_entry_holds_for_its_capability_bytes_and_head_dim_alone(table):
    tuned.save(table, [ENTRY])
    assert tuned.find((9, 0), 2, 128) == (64, 32, 4, 3)
    for other in (((9, 1), 2, 128), ((10, 0), 2, 128), ((9, 0), 4, 128), ((9, 0), 2, 64)):
        assert tuned.find(*other) is None


def test_the_kernel_launches_as_measured(table):
    plain = triton_configs.config(128, torch.bfloat16, (128, 64), (9, 0))
    tuned.save(table, [ENTRY])
    tuned._read.cache_clear()
    measured = {"TQ": 64, "TK": 32, "num_warps": 4, "num_stages": 3}
    for head_dim in (65, 72, 128):
        for dtype in (torch.bfloat16, torch.float16):
            assert triton_configs.config(head_dim, dtype, (128, 64), (9, 0)) == measured
    other_chip = triton_configs.config(128, torch.bfloat16, (128, 64), (10, 0))
    assert other_chip == plain  # the kernel's table
    assert triton_configs.config(128, torch.float32, (128, 64), (9, 0))["TQ"] == 32


@pytest.mark.parametrize("launch", [(128, 128, 8, 2), (64, 32, 4, 8), (32, 64, 8, 1)], ids=str)
def test_every_launch_of_a_table_fits_every_mask(launch):
    for bq in triton.QUERY_BLOCKS:
        for bk in triton.KEY_BLOCKS:
            options = triton_configs.launch_options(tuned.Launch(*launch), (bq, bk))
            assert bq % options["TQ"] == bk % options["TK"] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": 48}, "`rows` must be one of 32, 64, 128, got 48"),
        ({"keys": 256}, "`keys` must be one of 32, 64, 128, got 256"),
        ({"warps": 6}, "`warps` must be one of 4, 8, got 6"),
        ({"warps": 8.0}, "`warps` must be one of 4, 8, got 8.0"),
        ({"stages": 0}, "`stages` must be one of"),
        ({"stages": "5"}, "`stages` must be one of"),
        ({"head_dim": 100}, "`head_dim` must be one of 64, 128, 256, got 100"),
        ({"element_bytes": 1}, "`element_bytes` must be one of 2, 4, got 1"),
        ({"capability": "sm_90"}, "`capability` must be like '9.0', got 'sm_90'"),
        ({"capability": 9.0}, "`capability` must be like '9.0', got 9.0"),
        ({"gain": -1}, "`gain` must be a positive number, got -1"),
        ({"gpu": None}, "`gpu` must be text, got None"),
        ({"more": 1}, "exactly the fields"),
    ],
    ids=str,
)
def test_a_bad_entry_is_refused_by_name(table, change, words):
    write(table, **change)
    with pytest.raises(ValueError, match="entry 0") as caught:
        tuned.find((9, 0), 2, 128)
    assert words in str(caught.value)
    assert str(table) in str(caught.value)
    assert "measure again" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"entries": {}}', '{"entries": 3}'], ids=repr)
def test_a_damaged_file_is_refused_by_name(table, text):
    table.write_text(text)
    with pytest.raises(ValueError, match="is not a table of launch configurations") as caught:
        tuned.find((8, 0), 2, 64)
    assert str(table) in str(caught.value)


def test_two_entries_for_one_key_are_refused(table):
    table.write_text(json.dumps({"entries": [dataclasses.asdict(ENTRY)] * 2}))
    with pytest.raises(ValueError, match="entry 1: there are two"):
        tuned.load(table)


def test_nothing_is_written_over_a_damaged_table(table):
    table.write_text("{")
    with pytest.raises(ValueError, match="is not a table"):
        tuned.save(table, [ENTRY])
    assert table.read_text() == "{"


def test_the_committed_table_is_sound():
    tuned.load(tuned.PATH)
