"""What FlashAttention-4 is handed is the mask: a stand-in computes attention from that alone, in float64.

The stand-in has the interface of flash-attn-4: it looks at nothing but the arguments, block lists row by row,
and calls the function of an element as its kernels do, in partial blocks.
"""

import sys
import types
from typing import NamedTuple

import pytest
import torch
from attention_cases import Case

from dit_accel.kernels import can_run
from dit_accel.kernels.block_sparse import fa4, reference
from dit_accel.kernels.block_sparse.problem import Problem

SIZE = (128, 128)
ASKED = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": 128, "block_size": SIZE}
CASES = [
    Case(1, block_size=SIZE),
    Case(300, batch=2, dim=16, block_size=SIZE, strided=True),
    Case(300, dim=16, extra_keys=77, block_size=(256, 128)),
    Case(300, heads=3, dim=16, per_head=True, batch=2, text=40, text_valid=(5, 40), block_size=SIZE),
    Case(
        300, dim=16, per_head=True, per_sample=True, batch=3, text=40, text_valid=(5, 40, 0), block_size=SIZE
    ),
    Case(300, batch=2, dim=16, text=40, text_valid=(3, 0), density=0.0, block_size=SIZE),
]


class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    cu_total_m_blocks: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None


def flash_attn_func(
    q, k, v, softmax_scale=None, causal=False, mask_mod=None, aux_tensors=None, block_sparse_tensors=None,
    return_lse=False,
):  # fmt: skip
    """q, k, v (batch, tokens, heads, head_dim); lse (batch, heads, tokens), natural logarithm."""
    (batch, tokens, heads, _), lists, keys = q.shape, block_sparse_tensors, k.shape[1]
    bq, bk = lists.block_size
    rows, columns = -(-tokens // bq), -(-keys // bk)
    shown = torch.zeros(batch, heads, rows * bq, columns * bk, dtype=torch.bool)
    for count, index, whole in (
        (lists.mask_block_cnt, lists.mask_block_idx, False),
        (lists.full_block_cnt, lists.full_block_idx, True),
    ):  # fmt: skip
        assert count.dtype == index.dtype == torch.int32
        assert count.shape == index.shape[:3]
        assert count.shape[0] in (1, batch)
        assert count.shape[1] in (1, heads)
        assert count.shape[2] == rows
        assert index.shape[3] <= columns
        count, index = count.expand(batch, heads, -1), index.expand(batch, heads, -1, -1)
        for b, h, row in torch.cartesian_prod(*map(torch.arange, (batch, heads, rows))).tolist():
            for column in index[b, h, row, : count[b, h, row]].tolist():
                query = torch.arange(row * bq, row * bq + bq)[:, None]
                key = torch.arange(column * bk, column * bk + bk)[None]
                sample, head = torch.tensor(b), torch.tensor(h)
                vectors = ([x] for x in (sample, head, query % tokens))
                bits = mask_mod(*vectors, Element([key % keys]), None, aux_tensors)
                block = shown[b, h, row * bq : row * bq + bq, column * bk : column * bk + bk]
                assert not block.any(), "a block was listed twice"
                block[:] = True if whole else bits
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.mT * softmax_scale).masked_fill(~shown[:, :, :tokens, :keys], -torch.inf)
    out = scores.softmax(-1) @ v  # not a number where nothing is attended
    assert return_lse
    return out.transpose(1, 2).to(torch.float32), scores.logsumexp(-1).float()


class Element(list):
    """A vector of one element, as the kernels' own type compares them."""

    def __lt__(self, other):
        return self[0] < other

    def __ge__(self, other):
        return self[0] >= other


@pytest.fixture
def package(monkeypatch):
    """The package, and what it needs: every module that is imported of them."""
    modules = {
        "flash_attn": {},
        "flash_attn.cute": {},
        "flash_attn.cute.interface": {"flash_attn_func": flash_attn_func},
        "flash_attn.cute.block_sparsity": {"BlockSparseTensorsTorch": BlockSparseTensorsTorch},
        "flash_attn.cute.utils": {"scalar_to_ssa": lambda value, kind: value},
        "cutlass": {"Int32": int},
        "cutlass.cute": {"jit": lambda function: function},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
    for cached in (fa4.lacking, fa4.mask_mod):
        cached.cache_clear()
    yield sys.modules
    for cached in (fa4.lacking, fa4.mask_mod):
        cached.cache_clear()


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_it_is_handed_is_the_mask(case):
    q, k, v = case.inputs()
    mask, valid = case.mask(), case.valid()
    options = {"scale": 0.25, "text_valid": None if valid is None else valid.int()}
    out, lse = fa4.attend(q, k, v, mask, Problem.of(q, k, v, mask), **options)
    expected, expected_lse = reference.attention(q.double(), k.double(), v.double(), mask, **options)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-5)
    assert case.density or (out == 0).all(-1).any(), "rows that attend nothing are part of it"


def test_whole_and_absent_blocks_have_tiles_of_their_own():
    """So that an element of any block can be asked for."""
    mask = Case(700, per_head=True, block_size=(64, 64)).mask()
    lists, dense = fa4.Lists.of(mask), mask.to_kernel_mask()
    tile = lists.tile_of[0].repeat_interleave(64, 1).repeat_interleave(64, 2)[:, :700, :700].long()
    query, key = torch.arange(700)[:, None], torch.arange(700)
    bits = lists.words[tile, query % 64, key % 64 // 32] >> (key % 32) & 1
    assert mask.num_full
    assert (lists.tile_of == len(lists.words) - 1).any()
    assert torch.equal(bits.bool(), dense[mask.head_groups.long()])


def hopper(monkeypatch, capability=(9, 0)):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("change", "capability", "words"),
    [
        ({}, (9, 0), None),
        ({"return_lse": True, "tail": "pooled"}, (9, 0), None),
        ({"block_size": (256, 128)}, (10, 0), None),
        (
            {},
            (10, 0),
            "fa4 needs blocks of (256, 128) on this GPU, got (128, 128); use block_size=(256, 128)",
        ),
        ({"block_size": (128, 64)}, (9, 0), "fa4 needs blocks of (128, 128) on this GPU, got (128, 64)"),
        ({}, (8, 0), "compute capability 9.x to 11.x, got 8.0"),
        ({}, (12, 0), "compute capability 9.x to 11.x, got 12.0"),
        ({"head_dim": 256}, (9, 0), "a head_dim up to 128 that 8 divides, got 256"),
        ({"head_dim": 20}, (9, 0), "that 8 divides, got 20"),
        ({"dtype": torch.float32}, (9, 0), "fa4 supports float16, bfloat16"),
        ({"requires_grad": True}, (9, 0), "fa4 has no backward pass"),
        ({"quantization": "int8"}, (9, 0), "fa4 does not compute quantization='int8'"),
        ({"device": "cpu"}, (9, 0), "fa4 needs an NVIDIA GPU that PyTorch can use, got device 'cpu'"),
    ],
    ids=str,
)
def test_where_it_runs(change, capability, words, monkeypatch):
    hopper(monkeypatch, capability)
    reason = can_run("fa4", **(ASKED | change))
    assert reason is None if words is None else words in reason


def test_without_the_package_it_says_how_to_get_it(monkeypatch):
    hopper(monkeypatch)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    fa4.lacking.cache_clear()
    assert "pip install flash-attn-4" in can_run("fa4", **ASKED)
    fa4.lacking.cache_clear()


def test_an_older_package_is_told_by_what_it_lacks(package, monkeypatch):
    hopper(monkeypatch)
    package["flash_attn.cute.interface"].flash_attn_func = lambda q, k, v, softmax_scale, return_lse: None
    assert "does not know aux_tensors, block_sparse_tensors, mask_mod" in can_run("fa4", **ASKED)
