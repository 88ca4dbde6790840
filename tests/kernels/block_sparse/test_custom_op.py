"""Masks as values of compiled code: one graph for masks it was not compiled for, made in it or outside."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace

import pytest
import torch

from dit_accel import BlockMask, TokenLayout
from dit_accel.kernels import block_sparse_attention
from dit_accel.kernels.block_sparse import custom_op, gather_chunks
from dit_accel.kernels.block_sparse.problem import Problem
from dit_accel.patterns import Neighborhood

LAYOUT = TokenLayout((1, 8, 12), text_len=7)
SIZE = (32, 16)


def mask_and_inputs():
    mask = Neighborhood((3, 5)).block_mask(LAYOUT, block_size=SIZE)
    generator = torch.Generator().manual_seed(0)
    return mask, torch.randn(3, 2, 2, LAYOUT.seq_len, 16, generator=generator).unbind()


def selections(count=3):
    """Blocks chosen for each sample and head, of different numbers."""
    generator = torch.Generator().manual_seed(1)
    rows, cols = (-(-LAYOUT.seq_len // size) for size in SIZE)
    return [torch.rand(2, 2, rows, cols, generator=generator) < share for share in (0.2, 0.5, 0.9)[:count]]


def as_mask(selected):
    text = (LAYOUT.visual_len, LAYOUT.seq_len)
    lengths = {"seq_len": LAYOUT.seq_len, "kv_len": LAYOUT.seq_len}
    return BlockMask.from_blocks(selected, block_size=SIZE, text=text, **lengths)


class Compiled:
    """A function in one graph, and how many graphs were made of it."""

    def __init__(self, function):
        torch.compiler.reset()
        self.graphs = 0
        self.run = torch.compile(function, fullgraph=True, backend=self._counted)

    def _counted(self, graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs += 1
        return aot_eager(graph, inputs)


@pytest.mark.parametrize("backend", ["auto", "native", "gather", "reference"])
def test_compiles_without_a_graph_break(backend):
    mask, (q, k, v) = mask_and_inputs()
    options = {"text_valid": torch.tensor([3, 7]), "scale": 0.3, "return_lse": True, "backend": backend}
    compiled = Compiled(lambda q, k, v, mask: block_sparse_attention(q, k, v, mask, **options))
    assert all(
        map(torch.equal, compiled.run(q, k, v, mask), block_sparse_attention(q, k, v, mask, **options))
    )


@pytest.mark.parametrize("backend", ["native", "gather"])
def test_compiles_with_a_tail(backend):
    mask, (q, k, v) = mask_and_inputs()
    options = {"text_valid": torch.tensor([3, 7]), "backend": backend, "tail": "pooled"}
    compiled = Compiled(lambda q, k, v, mask: block_sparse_attention(q, k, v, mask, **options))
    assert torch.equal(compiled.run(q, k, v, mask), block_sparse_attention(q, k, v, mask, **options))


@pytest.mark.parametrize("backend", ["native", "gather"])
def test_one_graph_for_masks_made_in_it(backend):
    _, (q, k, v) = mask_and_inputs()

    def attend(q, k, v, selected):
        return block_sparse_attention(q, k, v, as_mask(selected), backend=backend)

    compiled = Compiled(attend)
    for selected in selections():
        assert torch.equal(compiled.run(q, k, v, selected), attend(q, k, v, selected))
    assert compiled.graphs == 1


@pytest.mark.parametrize("backend", ["native", "gather"])
def test_one_graph_for_masks_passed_to_it(backend):
    _, (q, k, v) = mask_and_inputs()

    def attend(q, k, v, mask):
        return block_sparse_attention(q, k, v, mask, backend=backend)

    compiled = Compiled(attend)
    masks = [as_mask(selected) for selected in selections()]
    for mask in (*masks, copy.deepcopy(masks[0])):
        for _ in range(2):
            assert torch.equal(compiled.run(q, k, v, mask), attend(q, k, v, mask))
    assert compiled.graphs == 1


def test_lists_of_other_lengths_cost_one_more_graph_for_all_lengths():
    _, (q, k, v) = mask_and_inputs()
    compiled = Compiled(lambda q, k, v, mask: block_sparse_attention(q, k, v, mask))
    for window in ((3, 5), (5, 3), (7, 7), (2, 9), (3, 12)):
        mask = Neighborhood(window).block_mask(LAYOUT, block_size=SIZE, order="raster")
        assert torch.equal(compiled.run(q, k, v, mask), block_sparse_attention(q, k, v, mask))
    assert compiled.graphs <= 2


def by_operator(q, k, v, mask):
    problem = Problem.of(q, k, v, mask)
    return custom_op.attend("gather", q, k, v, mask, problem, scale=0.25, text_valid=None)[0]


class TestLaunchData:
    def test_is_shared_by_calls_with_one_mask_and_by_no_other(self):
        mask, (q, k, v) = mask_and_inputs()
        other = replace(mask, tiles=mask.tiles ^ mask.tiles)
        for each in (mask, mask, other, mask):
            out = by_operator(q, k, v, each)
            assert torch.equal(out, block_sparse_attention(q, k, v, each, backend="gather", scale=0.25))

    def test_plans_are_made_once(self, monkeypatch):
        mask, (q, k, v) = mask_and_inputs()
        first = by_operator(q, k, v, mask)
        monkeypatch.setattr(gather_chunks, "_Rows", None)
        assert torch.equal(by_operator(q, k, v, mask), first)

    def test_keeps_nothing_alive(self):
        mask, (q, k, v) = mask_and_inputs()
        gc.collect()
        before = len(custom_op._launch_data)
        by_operator(q, k, v, mask)
        assert len(custom_op._launch_data) == before + 1
        del mask
        gc.collect()
        assert len(custom_op._launch_data) == before


def test_operator():
    """PyTorch's own checks: the schema, the shapes and strides promised to the compiler."""
    mask, (q, k, v) = mask_and_inputs()
    full, partial = mask.full, mask.partial
    torch.library.opcheck(
        torch.ops.dit_accel.block_sparse_attention_plain.default,
        (
            q, k, v,
            full.start, full.count, full.index, partial.start, partial.count, partial.index, partial.tile,
            mask.tiles, None, torch.tensor([3, 7]), *mask.block_size, *mask.text, 0.25, True,
            None, None, None, "gather",
        ),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
