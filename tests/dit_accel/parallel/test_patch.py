"""Patch parallelism: bands of rows give the picture of one process, and send a fixed number of rows."""

from types import SimpleNamespace

import processes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from dit_accel import Recipe, TokenLayout, UnavailableError
from dit_accel.attention import banded
from dit_accel.attention.banded import BandedAttention, Bands
from dit_accel.attention.call import AttentionCall
from dit_accel.parallel import patch, patch_parallel
from dit_accel.patterns import Clear, Dense, InwardWindow, Neighborhood, Routed, SlidingTile

ROUNDING = 1e-6  # of the largest value
WIDTH, ROWS, HEADS, HEAD_DIM, FLOAT = 8, 2, 2, 16, 4  # of the cases whose halo has two rows
BAND = 6  # rows of a process


def check(told: list[dict]) -> None:
    cases = {name: [one[name] for one in told] for name in told[0]}
    assert [one["equal"] for one in cases.pop("restored")] == [True] * len(told)
    for one in cases.pop("refused"):
        assert f"{len(told)} processes have bands of {BAND} rows" in one["raised"]
        assert "needs bands of at least 19; use fewer processes" in one["raised"]
    for one in cases.pop("replaced"):
        assert "end its `with` block first" in one["raised"]
    for name, of_case in cases.items():
        assert all("error" in one for one in of_case), (name, of_case)
        assert len({tuple(one["same"]) for one in of_case}) == 1, name
        worst = max(one["error"] for one in of_case)
        assert 1e-6 < worst < 1e-2 if name == "averaged" else worst < ROUNDING, (name, worst)
    one_edge = 2 * ROWS * WIDTH * HEADS * HEAD_DIM * FLOAT  # keys and values
    for name in ("clear", "neighborhood", "uneven bands"):
        edges = [1 if rank in (0, len(told) - 1) else 2 for rank in range(len(told))]
        assert [one["halo"] for one in cases[name]] == [one_edge * n for n in edges], name


def test_two_processes(tmp_path):
    check(processes.run("patch_parallel_cases", tmp_path, 2, "flux"))


@pytest.mark.slow
@pytest.mark.parametrize(("count", "family"), [(4, "flux"), (2, "flux2")])
def test_other_processes(tmp_path, count, family):
    """Each edge sends what it does between two."""
    check(processes.run("patch_parallel_cases", tmp_path, count, family))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_text_is_joined_to_rounding(monkeypatch, dtype):
    """In the inputs' dtype: twice what attention to all keys at once is off by, at most."""
    layout, told = TokenLayout((1, 8, 16), text_len=24, text_first=True), []
    draws = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 32, generator=draws).to(dtype) for n in (24, 280, 280))
    text = [q, k[:, :, :24], v[:, :, :24]]

    def exchange(sent, received, group):  # the last process has what all others sent
        told.append(sent[0])
        return tuple(told) if len(told) == len(sent) else sent

    monkeypatch.setattr(banded, "exchange", exchange)
    call = AttentionCall(q, k, v, layout, dense=lambda call: call.q)
    for rank in range(2):
        own = slice(24 + 128 * rank, 24 + 128 * (rank + 1))
        attention = BandedAttention(Bands(rank, 2, reach=2), layout, lambda pooled: None, ())
        joined = attention._of_text(call, text, k[:, :, own], v[:, :, own])
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    whole = F.scaled_dot_product_attention(q, k, v)
    assert joined.dtype == dtype
    assert (joined - exact).norm() < 2 * (whole - exact).norm() + 1e-6


@given(
    st.sampled_from([Clear(2), Clear(2.5), InwardWindow((2, 1)), Neighborhood((3, 3)), Neighborhood((4, 3))]),
    st.integers(1, 2),
    st.integers(2, 3),
    st.integers(0, 4),
)
def test_a_crop_shows_a_band_the_same_keys(pattern, frames, count, more):
    """Of bands of `band_rows`, `row_reach` is enough: the mask is then that of the whole picture."""
    rows = pattern.band_rows + more
    width, height = 4, rows * count
    whole = pattern.token_mask(TokenLayout((frames, height, width))).view((frames, height, width) * 2)
    for rank in range(count):
        bands = Bands(rank, count, pattern.row_reach)
        own = bands.rows(height)
        seen = slice(own.start - bands.above, own.stop + bands.below)
        queries = TokenLayout((frames, len(own), width), offset=(0, bands.above, 0))
        keys = TokenLayout((frames, seen.stop - seen.start, width))
        mine = whole[:, own.start : own.stop]
        crop = pattern.token_mask(queries, keys).view(*queries.grid, *keys.grid)
        assert torch.equal(crop, mine[:, :, :, :, seen])
        outside = mine.clone()
        outside[:, :, :, :, seen] = False
        assert not outside.any()


def test_reach():
    assert [Clear(r).row_reach for r in (1, 2, 2.5, 16)] == [0, 1, 2, 15]
    assert Neighborhood(5).row_reach == Neighborhood((3, 5, 7)).row_reach == 2
    assert [Clear(1).band_rows, Clear(16).band_rows, InwardWindow((2, 1)).band_rows] == [1, 15, 3]
    assert [Neighborhood(n).band_rows for n in (4, 5, 11)] == [2, 3, 6]
    for pattern in (
        Neighborhood(5, stride=2),
        Neighborhood(5, dilation=(1, 2)),
        Neighborhood((5,)),
        Dense(),
    ):
        assert pattern.row_reach is None


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (Recipe(SlidingTile((1, 8, 8), (1, 3, 3))), "SlidingTile.* is not bounded in the rows"),
        (Recipe(Routed(top_k=0.5)), "Routed.* is not bounded"),
        (Recipe(Clear(4), dense_steps=1), r"`dense_steps=1` needs what all tokens have.* use dense_steps=0"),
        (Recipe(Clear(4), quantization="int8"), "`quantization='int8'` needs"),
        (Recipe(Clear(4), tail="pooled"), "`tail='pooled'` needs"),
        (Recipe(Clear(4), min_tokens="auto"), "`min_tokens='auto'` needs"),
    ],
    ids=lambda x: x.tag if isinstance(x, Recipe) else "",
)
def test_recipes_that_need_more_are_named(recipe, reason):
    import re

    assert re.search(reason, patch.unbanded(recipe))


def test_bands_smaller_than_a_window():
    """A band and its halo of five rows would have ten, which a window of eleven does not fit into."""
    bands = Bands(0, 2, 5, Neighborhood(11).band_rows)
    with pytest.raises(ValueError, match=r"^2 processes have bands of 5 rows.* at least 6; use fewer proc"):
        bands.check(bands.sizes(10))
    bands.check(bands.sizes(12))


class TestRefused:
    @pytest.fixture(autouse=True)
    def _alone(self, monkeypatch):
        """A group of one that says it has two."""
        for name, value in {"is_initialized": True, "get_rank": 0, "get_world_size": 2}.items():
            monkeypatch.setattr(torch.distributed, name, lambda *a, value=value: value)

    def refused(self, pipe, recipe, match):
        with pytest.raises(UnavailableError, match=match), patch_parallel(pipe, recipe):
            pass

    def test_other_families(self, wan):
        self.refused(wan.make(), Neighborhood(3), "places its tokens inside.* use `context_parallel`")

    def test_layers_that_are_dense(self, flux):
        self.refused(flux.make(), Recipe({"double": Clear(3)}), "layer single.0 is dense.*all layers")

    def test_controlnet(self, flux):
        pipe = flux.make()
        inputs = dict.fromkeys(("hidden_states", "timestep"), SimpleNamespace())
        with (
            patch_parallel(pipe, Clear(3)),
            pytest.raises(UnavailableError, match="one process with ControlNet"),
        ):
            pipe.transformer(**inputs, controlnet_block_samples=[1])

    def test_text(self, flux):
        with pytest.raises(ValueError, match="`text` must be 'exact' or 'averaged'"):
            patch_parallel(flux.make(), Clear(3), text="none").__enter__()
