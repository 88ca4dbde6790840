"""Masks from blocks chosen on the device in every call: exact, and without waiting for the device."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from dit_accel import BlockMask


def dense(selected, block_size, seq_len, kv_len):
    """What is attended, by hand."""
    pairs = selected.repeat_interleave(block_size[0], -2).repeat_interleave(block_size[1], -1)
    return pairs[..., :seq_len, :kv_len]


@st.composite
def cases(draw):
    block_size = draw(st.sampled_from([(16, 8), (32, 16), (64, 16)]))
    lengths = {"seq_len": draw(st.integers(1, 150)), "kv_len": draw(st.integers(1, 150))}
    stop = draw(st.integers(0, lengths["kv_len"]))
    text = (draw(st.integers(0, stop)), stop)
    front = draw(st.sampled_from([(), (1,), (3,), (2, 3)]))
    shape = (*front, *(-(-n // size) for n, size in zip(lengths.values(), block_size, strict=True)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    selected = torch.rand(shape, generator=generator) < draw(st.sampled_from([0, 0.3, 0.8, 1]))
    return selected, {"block_size": block_size, "text": text, **lengths}


@given(cases())
@settings(max_examples=200, deadline=None)
def test_attends_to_the_selected_blocks(case):
    selected, options = case
    mask = BlockMask.from_blocks(selected, **options)
    expected = dense(selected, *(options[n] for n in ("block_size", "seq_len", "kv_len")))
    assert torch.equal(mask.to_token_mask(), expected)
    assert mask.density == pytest.approx(expected.double().mean().item(), abs=1e-12)
    mask._validated()


OPTIONS = {"block_size": (32, 16), "seq_len": 130, "kv_len": 150, "text": (120, 150)}


def test_groups_and_orders_may_be_given():
    selected = torch.rand(2, 5, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    groups = torch.tensor([1, 0, 1], dtype=torch.int32)
    order, key_order = torch.arange(130).flip(0), torch.arange(150).flip(0)
    mask = BlockMask.from_blocks(selected, **OPTIONS, head_groups=groups, order=order, key_order=key_order)
    expected = dense(selected, (32, 16), 130, 150)[groups.long()].flip(1, 2)
    assert torch.equal(mask.to_token_mask(), expected)


@pytest.mark.parametrize("front", [(), (3,), (2, 3)])
def test_nothing_waits_for_the_device(front, monkeypatch):
    """Tensors without contents: whatever asked for a value or a number of hits would raise.

    Nor is anything copied from the host to the device, for which PyTorch waits as well.
    """
    monkeypatch.setattr(torch, "tensor", None)
    with FakeTensorMode():
        selected = torch.empty(*front, 5, 10, dtype=torch.bool)
        mask = BlockMask.from_blocks(selected, **OPTIONS)
        lists = mask.transposed()
    assert mask.full.start.shape == ((torch.Size(front).numel()), 5)
    assert lists[0].start.shape == (torch.Size(front).numel(), 10)
    assert mask.head_groups is None or tuple(mask.head_groups.shape) == front


@pytest.mark.parametrize(
    ("selected", "got"),
    [
        (torch.ones(5, 9, dtype=torch.bool), r"torch.bool \(5, 9\)"),
        (torch.ones(5, 10), r"torch.float32 \(5, 10\)"),
        (torch.ones(10, dtype=torch.bool), r"torch.bool \(10,\)"),
        (torch.ones(1, 1, 1, 5, 10, dtype=torch.bool), r"torch.bool \(1, 1, 1, 5, 10\)"),
    ],
)
def test_selections_that_do_not_fit(selected, got):
    with pytest.raises(ValueError, match=rf"must be bool of shape \(5, 10\).*got {got}"):
        BlockMask.from_blocks(selected, **OPTIONS)
