import copy

import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.kernels import block_sparse_attention
from dit_accel.kernels.block_sparse import opaque
from dit_accel.patterns import Neighborhood

LAYOUT = TokenLayout((1, 8, 12), text_len=7)


def mask_and_inputs():
    mask = Neighborhood((3, 5)).block_mask(LAYOUT, block_size=(32, 16))
    generator = torch.Generator().manual_seed(0)
    return mask, torch.randn(3, 2, 2, LAYOUT.seq_len, 16, generator=generator).unbind()


def compiled(**options):
    torch.compiler.reset()
    attend = lambda q, k, v, mask: block_sparse_attention(q, k, v, mask, **options)  # noqa: E731
    return torch.compile(attend, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("backend", ["auto", "gather", "reference"])
def test_compiles_without_a_graph_break(backend):
    mask, (q, k, v) = mask_and_inputs()
    options = {"text_valid": torch.tensor([3, 7]), "return_lse": True, "backend": backend}
    expected = block_sparse_attention(q, k, v, mask, **options)
    opaque.announce(mask)
    assert all(map(torch.equal, compiled(**options)(q, k, v, mask), expected))


def test_a_graph_serves_masks_it_was_not_compiled_for():
    mask, (q, k, v) = mask_and_inputs()
    other = Neighborhood((5, 3)).block_mask(LAYOUT, block_size=(32, 16))
    attend = compiled()
    for each in (mask, other, copy.deepcopy(mask)):  # a copy has a number of its own
        opaque.announce(each)
        assert torch.equal(attend(q, k, v, each), block_sparse_attention(q, k, v, each))


def test_announcing_again_keeps_the_number_and_keeps_nothing_alive():
    mask, _ = mask_and_inputs()
    opaque.announce(mask)
    number = int(mask.cache[opaque.NUMBER])
    opaque.announce(mask)
    assert int(mask.cache[opaque.NUMBER]) == number
    assert opaque.masks[number] is mask
    del mask
    assert number not in opaque.masks


def test_operator():
    """PyTorch's own checks: the schema, the shapes and strides promised to the compiler."""
    mask, (q, k, v) = mask_and_inputs()
    opaque.announce(mask)
    arguments = (q, k, v, mask.cache[opaque.NUMBER], torch.tensor([3, 7]), 0.25, True, "gather")
    torch.library.opcheck(
        torch.ops.dit_accel.block_sparse_attention_plain.default,
        arguments,
        test_utils=("test_schema", "test_faketensor"),
    )
