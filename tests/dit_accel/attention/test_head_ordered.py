import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.attention.arrangement import call_order
from dit_accel.attention.call import AttentionCall
from dit_accel.attention.head_ordered import HeadOrdered
from dit_accel.patterns import Dense, Neighborhood, SparseVideoGen

LAYOUT = TokenLayout((4, 4, 6), 7)
SVG = SparseVideoGen(0.7, True, block_size=8, profile_frames=2)
NEAR = Neighborhood((3, 3, 3))
ORDER = torch.randperm(LAYOUT.visual_len, generator=torch.Generator().manual_seed(1))
HEADS = {"all": [SVG] * 4, "some": [NEAR, SVG, Dense(), SVG]}


def choice_of(heads, order=ORDER, layout=LAYOUT) -> HeadOrdered:
    masks = {p: p.block_mask(layout, (16, 8), order) for p in heads if p != SVG}
    masks = {SVG: SVG.head_mask(layout, (16, 8)), **masks}
    return HeadOrdered.of(SVG, heads, masks, layout, call_order(layout, order))


def call_of(q, k, v, text_valid=None, layout=LAYOUT, **options) -> AttentionCall:
    return AttentionCall(q, k, v, layout, dense=None, text_valid=text_valid, backend="gather", **options)


def temporal_of(choice: HeadOrdered, *arguments, **options) -> torch.Tensor:
    return choice.resolved(call_of(*arguments, **options)).temporal


def tensors(dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (3, LAYOUT.seq_len, 4, 8)
    return [2 * torch.randn(shape, generator=generator, dtype=dtype).transpose(1, 2) for _ in range(3)]


def masked(q, k, v, heads, temporal, text_valid, layout) -> torch.Tensor:
    """Dense attention in the model's order under the token masks of what was chosen."""
    out = torch.empty_like(q)
    for b in range(len(q)):
        for h, pattern in enumerate(heads):
            kind = pattern if pattern != SVG else SVG.temporal if temporal[b, h] else SVG.spatial
            mask = kind.token_mask(layout)
            mask[:, layout.padding(text_valid)[b]] = False
            scores = (q[b, h] @ k[b, h].T / 8**0.5).where(mask, -torch.inf)
            out[b, h] = scores.softmax(1) @ v[b, h]
    return out


@pytest.mark.parametrize("text_first", [False, True], ids=["text-last", "text-first"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_matches_dense_attention_under_the_chosen_masks(heads, text_first):
    (q, k, v), text_valid = tensors(), torch.tensor([7, 3, 1])
    layout = TokenLayout(LAYOUT.grid, LAYOUT.text_len, text_first)
    choice, order = choice_of(heads, layout=layout), call_order(layout, ORDER)
    call = call_of(*(x[:, :, order] for x in (q, k, v)), text_valid, layout, step=2)
    out, temporal = choice(call), call.notes["temporal heads"]
    expected = masked(q, k, v, heads, temporal, text_valid, layout)[:, :, order]
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    chosen = temporal[:, [p == SVG for p in heads]]
    assert 0 < chosen.sum() < chosen.numel()
    assert temporal.sum() == chosen.sum()
    assert torch.equal(call.notes["choosing heads"], torch.tensor([p == SVG for p in heads]))


def test_order_of_the_transformer_changes_no_choice():
    (q, k, v), raster = tensors(), torch.arange(LAYOUT.visual_len)
    choices = []
    for order in (ORDER, raster):
        choice, at = choice_of(HEADS["all"], order), call_order(LAYOUT, order)
        choices.append(temporal_of(choice, *(x[:, :, at] for x in (q, k, v))))
    assert torch.equal(*choices)


def test_padded_text_changes_no_choice():
    q, k, v = tensors()
    choice, valid = choice_of(HEADS["all"]), torch.tensor([4, 4, 4])
    before = temporal_of(choice, q, k, v, valid)
    k[:, :, LAYOUT.visual_len + 4 :] = 9
    v[:, :, LAYOUT.visual_len + 4 :] = 1e3
    assert torch.equal(temporal_of(choice, q, k, v, valid), before)
    assert not torch.equal(temporal_of(choice, q, k, v), before)


def test_density_is_that_of_the_patterns():
    for heads in HEADS.values():
        choice = choice_of(heads)
        assert choice.density == pytest.approx(sum(p.density(LAYOUT) for p in heads) / 4)
        assert choice.density <= choice.block_density
