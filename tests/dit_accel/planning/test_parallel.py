"""What several GPUs send each other: bytes counted by hand, times by the model that is stated."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dit_accel import Recipe, TokenLayout
from dit_accel.patterns import Clear, Neighborhood
from dit_accel.planning.parallel import by_heads, sharings
from dit_accel.planning.plan import plan

HEADS, HEAD_DIM, LAYERS, TEXT, BF16 = 24, 128, 57, 512, 2


def planned(side: int, family: str = "flux", **changes) -> SimpleNamespace:
    """A plan of FLUX with a picture of so many tokens along a side."""
    tokens = side * side + TEXT
    told = {
        "family": family,
        "grid": (1, side, side),
        "tokens": tokens,
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "dtype": "bfloat16",
        "block_density": 0.25,
        "layers": (SimpleNamespace(names=tuple(range(LAYERS)), tokens=tokens, block_density=0.25),),
        "head_works": dict,
        "layout": TokenLayout((1, side, side), TEXT, text_first=True),
        "flops": SimpleNamespace(attention=4e12, rest=3e12),
    }
    return SimpleNamespace(**(told | changes))


def test_by_heads():
    side, gpus = 64, 4
    heads, _ = sharings(planned(side), Recipe(Clear(8)), gpus, link=50, call_seconds=2.0)
    tokens, width = side * side + TEXT, HEADS * HEAD_DIM
    assert heads.sent_bytes == 4 * tokens * width * BF16 * LAYERS * (gpus - 1) // gpus**2
    assert heads.work == pytest.approx(1 / gpus)
    assert heads.exchange_seconds == pytest.approx(heads.sent_bytes / 50e9)
    assert heads.seconds == pytest.approx(2.0 / gpus + heads.exchange_seconds)
    assert heads.speedup == pytest.approx(2.0 / heads.seconds)


def test_heads_that_do_not_divide_are_the_busiest_gpus():
    heads, _ = sharings(planned(64), Recipe(Clear(8)), 16)
    attention = 4e12 * 0.25 / (4e12 * 0.25 + 3e12)
    assert heads.work == pytest.approx(attention * 2 / 24 + (1 - attention) / 16)
    assert heads.exchange_seconds is heads.seconds is None


def test_heads_that_differ_are_dealt_out():
    works = dict.fromkeys(range(LAYERS), (1.0,) * 12 + (0.1,) * 12)
    heads = by_heads(planned(64, head_works=lambda: works), 2)
    assert (heads.imbalance, heads.neighbours) == (pytest.approx(1), pytest.approx(2 / 1.1))
    assert heads.work == pytest.approx(1 / 2)


def test_what_is_joined_in_each_layer_is_counted():
    plain, helios = (by_heads(planned(64, family), 4) for family in ("wan", "helios"))
    own = (64 * 64 + TEXT) // 4
    assert helios.sent_bytes - plain.sent_bytes == LAYERS * 3 * own * 3 * HEADS * HEAD_DIM * BF16


def test_work_of_heads_by_a_plan():
    answer = plan(Recipe({"heads.0-1": Clear(3)}, dense_layers=1), model="tiny-flux", size=(192, 192))
    dense, *others = answer.head_works().values()
    assert dense == (1.0,)
    for work in others:
        assert work[0] == work[1] < 1 == work[2] == work[3]
    alike = plan(Recipe(Clear(3)), model="tiny-flux", size=(192, 192))
    assert set(alike.head_works().values()) == {(1.0,)}
    found = by_heads(answer, 2)
    assert found.imbalance == pytest.approx(1)
    assert found.neighbours > 1.1


def test_rows_do_not_depend_on_how_many_gpus():
    found = {n: sharings(planned(128), Recipe(Clear(16)), n)[1] for n in (4, 8)}
    edges = 2 * 2 * 15 * 128 * HEADS * HEAD_DIM * BF16 * LAYERS
    assert found[4].halo_bytes == found[8].halo_bytes == edges
    text = {n: one.sent_bytes - one.halo_bytes for n, one in found.items()}
    lse = 2  # numbers of 16 bits, as one would not be exact
    assert text == {n: (n - 1) * TEXT * HEADS * (HEAD_DIM + lse) * BF16 * LAYERS for n in (4, 8)}
    assert found[4].work == pytest.approx((32 * 128 + TEXT) / (128**2 + TEXT))
    assert sharings(planned(128), Recipe(Clear(16)), 2)[1].halo_bytes == edges // 2  # one edge each


@pytest.mark.parametrize(
    ("planned", "recipe", "gpus", "way", "reason"),
    [
        (planned(64), Recipe(Clear(8)), 25, 0, "24 heads are shared by at most as many"),
        (planned(64), Recipe(Clear(8), dense_steps=1), 2, 1, "`dense_steps=1` needs what all tokens have"),
        (planned(64), Recipe(Clear(8)), 16, 1, "bands of 4 rows, fewer than the 7 that the pattern needs"),
        (planned(64, "wan"), Recipe(Neighborhood(3)), 2, 1, "wan places its tokens inside"),
        (planned(64, "wan-animate"), Recipe(Neighborhood(3)), 2, 0, "wan-animate: its face adapter"),
    ],
    ids=["heads", "dense", "bands", "family", "plan"],
)
def test_what_is_not_possible_is_said(planned, recipe, gpus, way, reason):
    found = sharings(planned, recipe, gpus, link=50)[way]
    assert reason in found.refused
    assert found.sent_bytes is found.seconds is None


def test_bad_input():
    for options, message in (
        ({"gpus": 1}, "`gpus` must be at least 2"),
        ({"gpus": 2, "link": 0}, "`link`"),
        ({"gpus": 2, "call_seconds": -1}, "`call_seconds`"),
    ):
        with pytest.raises(ValueError, match=message):
            sharings(planned(64), Recipe(Clear(8)), **options)
