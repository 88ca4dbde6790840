"""The dual path of one layer against its formula in float64, with every score written out."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from dit_accel import TokenLayout
from dit_accel.attention.call import AttentionCall, ModelAttention
from dit_accel.attention.dual_path import DualPath, Rows, TextOverride
from dit_accel.attention.layer_masks import LayerMasks, layer_attention
from dit_accel.attention.run_memory import RunMemory
from dit_accel.patterns import Clear, InwardWindow

HEADS, DIM, GRID = 2, 16, (2, 5, 6)
WINDOW = InwardWindow((1, 1))


def dense(call: AttentionCall) -> torch.Tensor:
    hidden = call.hidden_keys()
    mask = None if hidden is None else ~hidden[:, None, None]
    return F.scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=mask, scale=call.scale)


def call_of(layout: TokenLayout, rows: int, text_valid=None, seed: int = 0) -> AttentionCall:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, rows, HEADS, layout.seq_len, DIM)
    qkv = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") * 2
    return AttentionCall(*qkv, layout, dense, text_valid=text_valid, backend="reference")


def dual(layout: TokenLayout, rows: Rows, full=None) -> DualPath:
    visual = TokenLayout(layout.grid)
    masks = [LayerMasks(own, "raster", (16, 16), torch.device("cpu")) for own in (visual, layout)]
    window = layer_attention([WINDOW] * HEADS, masks[0])
    return DualPath(
        window, layer_attention([full] * HEADS, masks[1]) if full else ModelAttention(), visual, rows
    )


def memory():
    """Of one run: `memory()` is that of its next step."""
    run, steps = RunMemory(), iter(range(100))
    return lambda: run.call("transformer", next(steps))


def softmax_over(parts, values):
    """Softmax over several lists of scores together, times their values."""
    weights = torch.cat(parts, -1).softmax(-1)
    return weights @ torch.cat(values, -2)


def expected(call, layout, rows: Rows, full_mask, reads=None):
    """The outputs of window and full rows, from dense scores; `reads`: queries, text keys and values kept."""
    visual, text, plain = layout.visual_slice, layout.text_slice, DIM**-0.5
    near = WINDOW.token_mask(TokenLayout(layout.grid))
    window, full = [], []
    guided = list(range(rows.batch))[rows.guided]
    for sample in range(rows.batch):
        own = [x[sample] for x in (call.q, call.k, call.v)]
        source = own
        if sample in guided and rows.full:
            source = [x[rows.batch + guided.index(sample)] for x in (call.q, call.k, call.v)]
        reading = reads[guided.index(sample)] if reads and sample in guided else source
        valid = layout.text_len if call.text_valid is None else int(call.text_valid[sample])
        there = slice(text.start, text.start + valid)
        scores = own[0][:, visual] @ own[1][:, visual].mT * plain * rows.scale
        scores = scores.masked_fill(~near, -torch.inf)
        to_text = reading[0][:, visual] @ reading[1][:, there].mT * plain
        out = torch.zeros_like(own[0])
        out[:, visual] = softmax_over([scores, to_text], [own[2][:, visual], reading[2][:, there]])
        seen = torch.ones(layout.seq_len, dtype=torch.bool)
        seen[text.start + valid : text.stop] = False
        of_text = source[0][:, text] @ source[1][:, seen].mT * plain
        out[:, text] = of_text.softmax(-1) @ source[2][:, seen]
        window.append(out)
        if sample in guided and rows.full:
            scores = source[0][:, visual] @ source[1][:, visual].mT * plain * rows.scale
            scores = scores.masked_fill(~full_mask, -torch.inf)
            to_text = source[0][:, visual] @ source[1][:, there].mT * plain
            other = out.clone()
            values = [source[2][:, visual], source[2][:, there]]
            other[:, visual] = softmax_over([scores, to_text], values)
            full.append(other)
    return torch.stack([*window, *full])


@pytest.mark.parametrize("text_first", [True, False], ids=["text-first", "text-last"])
@pytest.mark.parametrize("scale", [1.0, 1.05])
@pytest.mark.parametrize("full", [None, Clear(3)], ids=["dense", "sparse"])
@pytest.mark.parametrize("guided", [slice(0, 2), slice(1, 2)], ids=["all", "second"])
def test_joint_attention(text_first, scale, full, guided):
    layout = TokenLayout(GRID, text_len=7, text_first=text_first)
    rows = Rows(2, guided, full=True, memory=None, text_len=7, scale=scale)
    valid = torch.tensor([7, 3, 7, 3][: 2 + len(range(*guided.indices(2)))])
    if guided.start:
        valid = torch.tensor([7, 3, 3])
    call = call_of(layout, len(valid), None if text_first else valid)
    mask = torch.ones(60, 60, dtype=torch.bool)
    if full:
        mask = full.token_mask(TokenLayout(GRID))
    out = dual(layout, rows, full)(call)
    wanted = expected(call, layout, rows, mask)
    visible = torch.ones((*out.shape[:1], 1, layout.seq_len, 1), dtype=torch.bool)
    if call.text_valid is not None:
        visible &= ~call.hidden_keys()[:, None, :, None]
    assert torch.allclose(out * visible, wanted * visible, atol=1e-12)


def test_scale_of_text_keys_is_the_models_where_that_is_the_whole_difference():
    """With windows over everything and factor 1, both branches are ordinary joint attention."""
    layout = TokenLayout((1, 2, 3), text_len=4, text_first=True)
    rows = Rows(1, slice(0, 1), full=True, memory=None, text_len=4)
    one = call_of(layout, 1)
    twice = replace(one, q=one.q.repeat(2, 1, 1, 1), k=one.k.repeat(2, 1, 1, 1), v=one.v.repeat(2, 1, 1, 1))
    out = dual(layout, rows)(twice)
    assert torch.allclose(out, dense(one).expand_as(out), atol=1e-12)


@pytest.mark.parametrize("guided", [slice(0, 2), slice(1, 2)], ids=["all", "second"])
def test_joint_attention_with_text_that_was_kept(guided):
    layout = TokenLayout(GRID, text_len=7)
    step, count = memory(), len(range(*guided.indices(2)))
    first, then = call_of(layout, 2 + count), call_of(layout, 2, seed=1)
    rows = Rows(2, guided, full=True, memory=step(), text_len=7, scale=1.05)
    dual(layout, rows)(first)
    later = Rows(2, guided, full=False, memory=step(), text_len=7, scale=1.05)
    out = dual(layout, later)(then)
    reads = [[x[2 + i] for x in (first.q, first.k, first.v)] for i in range(count)]
    assert torch.allclose(out, expected(then, layout, later, None, reads), atol=1e-12)


def test_self_attention_without_text():
    layout = TokenLayout(GRID)
    rows = Rows(2, slice(0, 2), full=True, memory=None, text_len=7, scale=1.05)
    call = call_of(layout, 4)
    scores = call.q @ call.k.mT * DIM**-0.5 * 1.05
    scores[:2] = scores[:2].masked_fill(~WINDOW.token_mask(layout), -torch.inf)
    assert torch.allclose(dual(layout, rows)(call), scores.softmax(-1) @ call.v, atol=1e-12)


@pytest.mark.parametrize("guided", [slice(0, 2), slice(1, 2)], ids=["all", "second"])
def test_cross_attention_is_the_full_branchs(guided):
    step, count = memory(), len(range(*guided.indices(2)))
    q = torch.randn(2 + count, HEADS, 9, DIM, dtype=torch.float64)
    k, v = torch.randn(2, 2 + count, HEADS, 7, DIM, dtype=torch.float64)
    k[2:], v[2:] = k[guided], v[guided]
    call = AttentionCall(q, k, v, TokenLayout((1, 3, 3)), dense)
    rows = Rows(2, guided, full=True, memory=step(), text_len=7)
    out, plain = TextOverride(rows)(call), dense(call)
    assert torch.equal(out[2:], plain[2:])
    assert torch.equal(out[:2][guided], plain[2:])
    others = [i for i in range(2) if i not in range(*guided.indices(2))]
    assert torch.equal(out[others], plain[others])

    later = replace(call, q=torch.randn_like(q[:2]), k=k[:2], v=v[:2])
    reused = TextOverride(Rows(2, guided, full=False, memory=step(), text_len=7))(later)
    assert torch.equal(reused[guided], plain[2:])
    assert torch.equal(reused[others], dense(later)[others])


def test_image_keys_are_each_branchs_own():
    call = AttentionCall(*torch.randn(3, 2, HEADS, 9, DIM), TokenLayout((1, 3, 3)), dense)
    rows = Rows(1, slice(0, 1), full=True, memory=None, text_len=7)
    assert torch.equal(TextOverride(rows)(call), dense(call))


def test_nothing_to_reuse_is_an_error():
    call = AttentionCall(*torch.randn(3, 1, HEADS, 9, DIM), TokenLayout((1, 3, 3)), dense)
    rows = Rows(1, slice(0, 1), full=False, memory=memory()(), text_len=9)
    with pytest.raises(RuntimeError, match="there was none"):
        TextOverride(rows)(call)
