"""Names of attention layers: parts, groups and numbers."""

from dit_accel.layer_names import flat_indices, groups, split_part

DUAL = [f"blocks.{i}" for i in range(3)] + ["blocks.0.attn2", "blocks.2.attn2"]


def test_parts_have_the_number_of_their_layer():
    assert flat_indices(DUAL) == [0, 1, 2, 0, 2]
    assert groups(DUAL) == {"blocks": [0, 1, 2]}
    assert split_part("blocks.0.attn2") == ("blocks.0", "attn2")


def test_numbers_go_on_from_group_to_group():
    names = ["double.0", "double.1", "single.0"]
    assert flat_indices(names) == [0, 1, 2]
    assert groups(names) == {"double": [0, 1], "single": [2]}
