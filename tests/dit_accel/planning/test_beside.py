"""What patterns compute beside pairs of tokens, in plans: as PyTorch counts the products of such a layer."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dit_accel import TokenLayout
from dit_accel.attention.call import AttentionCall, LayerSizes
from dit_accel.attention.layer_masks import LayerMasks, layer_attention
from dit_accel.patterns import InLine, Neighborhood, SparseLinear, VideoSparse
from dit_accel.planning.plan import plan
from dit_accel.recipe.recipe import Recipe

LAYOUT, SIZES = TokenLayout((4, 8, 8)), LayerSizes(64, 2, 96)
STUDENTS = {
    "sparse-linear": SparseLinear(0.3, block_size=(32, 32)),
    "sparse-linear-all": SparseLinear(0.3, "all", block_size=(32, 32)),
    "video-sparse": VideoSparse(0.3, (2, 4, 4)),
    "inline": InLine(),
}


def counted(pattern, learned: bool) -> int:
    """Of all heads, in the parts that are products in PyTorch: not of the kernel."""
    weights = {name: torch.randn(x.shape) for name, x in pattern.learned(SIZES).items()} if learned else {}
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, SIZES.heads, LAYOUT.seq_len, SIZES.head_dim, generator=generator)
    layer = layer_attention([pattern] * SIZES.heads, LayerMasks(LAYOUT, None, (32, 32), torch.device("cpu")))
    x = torch.randn(1, LAYOUT.visual_len, SIZES.width, generator=generator)
    with FlopCounterMode(display=False) as counter:
        beside = pattern.of_input(x, weights, SIZES.heads)
        layer(AttentionCall(q, k, v, LAYOUT, dense=None, learned=weights, beside=beside, backend="native"))
    return counter.get_total_flops()


@pytest.mark.parametrize("pattern", STUDENTS.values(), ids=STUDENTS)
def test_it_is_what_pytorch_counts(pattern):
    """But for the denominators, 1 / D of it; the scores that choose are counted where they are also used."""
    layer = layer_attention([pattern], LayerMasks(LAYOUT, None, (32, 32), torch.device("cpu")))
    own = layer.pairs_beside(SIZES) * 4 * SIZES.head_dim * SIZES.heads
    added = counted(pattern, learned=True) - counted(pattern, learned=False)
    if pattern == InLine():  # linear without learned weights too; its kernels are no products in PyTorch
        added = counted(pattern, learned=False) + 18 * LAYOUT.visual_len * SIZES.head_dim * SIZES.heads
    if isinstance(pattern, VideoSparse):
        added += 2 * layer.cubes.count**2 * SIZES.head_dim * SIZES.heads
    assert own == pytest.approx(added, rel=2 / SIZES.head_dim)


@pytest.mark.parametrize("pattern", STUDENTS.values(), ids=STUDENTS)
def test_plans_count_it(pattern):
    options = {"family": "wan", "variant": "wan2.1-1.3b", "size": (256, 256), "frames": 17}
    answer = plan(Recipe(pattern), **options)
    tokens, layers, heads = answer.tokens, len(answer.flops.layers), answer.heads
    sizes = LayerSizes(answer.head_dim, heads, heads * answer.head_dim)
    pairs = answer.layer_attention.pairs_beside(sizes)
    assert answer.flops_beside == pytest.approx(4 * answer.head_dim * heads * pairs * layers, rel=1e-6)
    note = next(note for note in answer.notes if "more FLOPs" in note)
    assert pattern.rest in note
    assert f"{answer.flops_beside / answer.flops.total:.2%} more FLOPs at a sparse step" in note
    paid = answer.flops.attention * answer.block_density + answer.flops_beside
    assert answer.attention.ideal == pytest.approx(answer.flops.attention / paid)
    assert answer.step.ideal == pytest.approx(answer.flops.total / (paid + answer.flops.rest))
    half = plan(Recipe({"heads.0-5": pattern}), **options)
    assert half.flops_beside == pytest.approx(answer.flops_beside * 6 / heads, rel=1e-6)
    assert tokens == 5 * 16 * 16
    assert not plan(Recipe(Neighborhood((3, 5, 5))), **options).flops_beside
