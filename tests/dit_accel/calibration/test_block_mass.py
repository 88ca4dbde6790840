"""Mass of attention between blocks, against sums over a map of attention weights in float64."""

import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.attention.call import AttentionCall
from dit_accel.calibration import block_mass as module
from dit_accel.calibration.block_mass import block_mass
from dit_accel.masks.orders import AXIS_ORDERS
from dit_accel.patterns.reordered_blocks import block_labels

GRID, BATCH, HEADS = (3, 4, 5), 2, 3
LAYOUTS = {
    "no-text": TokenLayout(GRID),
    "text-last": TokenLayout(GRID, 7),
    "text-first": TokenLayout(GRID, 7, text_first=True),
}
LABELS = [block_labels(GRID, order, 16) for order in AXIS_ORDERS]


def call_of(layout, dtype=torch.float32, valid=None, scale=None):
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, HEADS, layout.seq_len, 8)
    q, k = (2 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return AttentionCall(q, k, k, layout, dense=lambda call: call.q, text_valid=valid, scale=scale)


def looped(call, labels, queries=None):
    """Entry by entry."""
    scale = 8**-0.5 if call.scale is None else call.scale
    scores = call.q.double() @ call.k.double().mT * scale
    if call.text_valid is not None:
        scores = scores.masked_fill(call.hidden_keys()[:, None, None], -torch.inf)
    visual = call.layout.visual_slice
    weights = scores.softmax(-1)[:, :, visual, visual].sum(0)
    mass = torch.zeros(HEADS, len(labels), 4, 4, dtype=torch.float64)
    for number, own in enumerate(labels):
        for i in range(len(own)) if queries is None else queries.tolist():
            for j in range(len(own)):
                mass[:, number, own[i], own[j]] += weights[:, i, j]
    return mass


@pytest.mark.parametrize("rows_at_once", [1, 7, 1000])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_sums_of_all_orders(layout, rows_at_once, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_BYTES", rows_at_once * BATCH * HEADS * layout.seq_len * 4)
    valid = torch.tensor([7, 3]) if layout.text_len else None
    call = call_of(layout, valid=valid)
    expected = looped(call, LABELS)
    found = block_mass(call, LABELS)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-6)
    exact = block_mass(call_of(layout, torch.float64, valid), LABELS)
    assert torch.allclose(exact, expected, rtol=0, atol=1e-6)
    if not layout.text_len:  # all of the attention is somewhere
        assert torch.allclose(found.sum((-2, -1)), torch.full((HEADS, 6), 120.0))


def test_some_queries_and_another_scale():
    queries = torch.tensor([0, 3, 17, 59])
    call = call_of(LAYOUTS["text-last"], scale=0.1)
    found = block_mass(call, LABELS, queries)
    assert torch.allclose(found.double(), looped(call, LABELS, queries), rtol=1e-5, atol=1e-6)
