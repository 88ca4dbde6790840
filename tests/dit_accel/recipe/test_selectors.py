import pytest

from dit_accel.recipe.selectors import assign, describe, select

FLUX = [f"double.{i}" for i in range(3)] + [f"single.{i}" for i in range(4)]
DUAL = [f"blocks.{i}" for i in range(3)] + ["blocks.0.attn2", "blocks.2.attn2"]


def layers(selector):
    return [layer for layer, _ in select(selector, FLUX, heads=4)]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6]),
        ("double", [0, 1, 2]),
        ("single", [3, 4, 5, 6]),
        ("double.0-1", [0, 1]),
        ("single.3", [6]),
        ("single.-1", [6]),
        ("single.-3--2", [4, 5]),
        ("2-4", [2, 3, 4]),
        ("-1", [6]),
        ("0, double.2,single", [0, 2, 3, 4, 5, 6]),
        ("heads.0-3", [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_layers(selector, expected):
    assert layers(selector) == expected


def test_heads():
    assert select("single.0/heads.1-2", FLUX, heads=4) == [(3, (1, 2))]
    assert select("single.0/heads.-1", FLUX, heads=4) == [(3, (3,))]
    assert select("double.0", FLUX, heads=4) == [(0, (0, 1, 2, 3))]


def test_later_entries_override_earlier_ones():
    table = assign({"all": "a", "double": "b", "heads.0": "c", "single.1": None}, FLUX, heads=2)
    assert table == [("c", "b")] * 3 + [("c", "a"), (None, None), ("c", "a"), ("c", "a")]


def test_unassigned_is_none():
    assert assign({"double": "a"}, FLUX, heads=1) == [("a",)] * 3 + [(None,)] * 4


def test_describe():
    assert describe(FLUX) == "double.0-2, single.0-3"
    assert describe(DUAL) == "blocks.0-2, blocks.attn2"


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("all", DUAL),
        ("blocks", DUAL),
        ("blocks.2", ["blocks.2", "blocks.2.attn2"]),
        ("blocks.-1", ["blocks.2", "blocks.2.attn2"]),
        ("0-1", ["blocks.0", "blocks.1", "blocks.0.attn2"]),
        ("attn2", ["blocks.0.attn2", "blocks.2.attn2"]),
        ("all.attn2", ["blocks.0.attn2", "blocks.2.attn2"]),
        ("blocks.attn2", ["blocks.0.attn2", "blocks.2.attn2"]),
        ("blocks.1-2.attn2", ["blocks.2.attn2"]),
        ("-1.attn2", ["blocks.2.attn2"]),
    ],
)
def test_parts(selector, expected):
    assert [DUAL[i] for i, _ in select(selector, DUAL, heads=4)] == expected


def test_parts_do_not_count():
    for selector, message in [
        ("3", "there are 3, numbered 0-2"),
        ("blocks.1.attn2", "no layer of 'blocks.1' has a part 'attn2'"),
        ("blocks.1.attn3", "matches no layer; the layers here are blocks.0-2, blocks.attn2"),
    ]:
        with pytest.raises(ValueError, match=message):
            select(selector, DUAL, heads=4)


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("blocks", "matches no layer; the layers here are double.0-2, single.0-3"),
        ("blocks.0-3", "matches no layer"),
        ("double.", "matches no layer"),
        ("", "matches no layer"),
        ("double.a", "matches no layer"),
        ("double.3", "out of range: there are 3, numbered 0-2"),
        ("double.2-1", "out of range"),
        ("7", "layer 7 is out of range: there are 7"),
        ("heads.4", "head 4 is out of range"),
        ("double/0-3", "expected `heads.`"),
        ("double/heads.x", "expected a number or a range"),
        (3, "must be text"),
    ],
)
def test_errors(selector, message):
    with pytest.raises(ValueError, match=message):
        select(selector, FLUX, heads=4)
