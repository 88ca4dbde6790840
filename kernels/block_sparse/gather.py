"""Block-sparse attention in plain PyTorch: gather each query block's keys, attend to them as dense batches.

Query blocks are sorted by the number of keys they attend and cut into chunks whose working set stays in the
processor's caches. A chunk is a handful of calls for its rows and as many heads as fit: gather K and V by
block, one batched product for the scores, add the mask on the columns of partial blocks only, normalise, one
batched product with V. What depends on the mask alone (chunks and their index lists) is made once and
kept with it.

Quantized numbers are multiplied as the fp32 numbers that they stand for, so that nothing is gained but to see
what a format does.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.masks.block_mask import BlockMask

from .formats import FORMATS
from .gather_chunks import Chunk, Round, chunks_of, packed_tiles
from .problem import Backend, Lengths, Problem
from .quantized import LOG2_E, Quantized

_BIAS_BYTES = 64 << 20  # tiles beyond this stay packed, and each chunk expands its own
_BOUND = 60.0  # of scores in base 2 that need no shift


def block_sizes(device: torch.device) -> dict[tuple[int, int], float]:
    """Large blocks gather less for each query; a GPU wants whole tiles."""
    return {(64, 16): 1.0, (128, 16): 0.89} if device.type == "cpu" else {(128, 64): 1.0}


@torch.compiler.disable
def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, problem: Problem, *, scale: float, text_valid: Lengths
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`block_sparse_attention` by gathering; lse is None unless asked for.

    bf16 and fp16 are computed in fp32, except that an accelerator, where lse is not wanted, treats them as
    plain attention in that dtype does: scores and probabilities are rounded to it.
    """
    if problem.quantization is None:
        return _attend_all(q, k, v, mask, problem, scale=scale, text_valid=text_valid)
    format = FORMATS[problem.quantization]
    given = Quantized.of(q, k, v, mask, format, scale=scale, text_valid=text_valid)
    q, k, v = given.widened(torch.promote_types(q.dtype, torch.float32))
    powers = None if format.weights is None else partial(format.powers, group=given.group)
    wide = replace(problem, dtype=q.dtype, return_lse=True)
    out, lse = _attend_all(q, k, v, mask, wide, scale=1 / LOG2_E, text_valid=text_valid, powers=powers)
    out, lse = given.finished(out, lse)
    return out.to(problem.dtype), lse


def _attend_all(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    problem: Problem,
    *,
    scale: float,
    text_valid: Lengths,
    powers: Callable[[Tensor], Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attend` of numbers as they are; `powers`, 2^scores if it is to be rounded."""
    grad = problem.requires_grad
    batch, heads, _, dim = q.shape
    bq, bk = mask.block_size
    dtype = _compute_dtype(problem)
    chunks = chunks_of(mask, batch, heads, dim, dtype)
    table = mask.derived(TileTable, lambda: TileTable.of(mask, dtype), dtype).table
    q, k, v = (x.to(dtype) for x in (q, k, v))
    q_blocks, k_blocks, v_blocks = (blocks_of(x, size) for x, size in ((q, bq), (k, bk), (v, bk)))
    in_base_2 = _in_base_2(dtype, grad)  # if not, a GPU is not waited for
    largest = largest_score(q, k, scale) if in_base_2 or q.device.type == "cpu" else math.nan
    bounded = in_base_2 and largest < _BOUND
    written = sum(len(part.query_blocks) for chunk in chunks for part in chunk.rounds)
    out = torch.empty_like(q_blocks) if written == len(q_blocks) else torch.zeros_like(q_blocks)
    lse = q_blocks.new_full((len(q_blocks), bq), -math.inf) if problem.return_lse else None
    if grad:  # even where no row attends anything, out depends on the inputs: by zero
        nothing = sum(x[:0].sum() for x in (q, k, v))
        out, lse = out + nothing, None if lse is None else lse + nothing
    # fmt: off
    job = _Job(q_blocks, k_blocks, v_blocks, mask, heads, scale, text_valid, grad, bounded,
               math.isfinite(largest), table, powers, out, lse)
    # fmt: on
    _run(job, chunks)
    shape = (batch, heads, mask.num_rows * bq)
    out = out.view(*shape, dim)[:, :, : mask.seq_len].to(problem.dtype)
    return out, lse.view(shape)[:, :, : mask.seq_len] if problem.return_lse else None


@dataclass(frozen=True, eq=False)
class _Job:
    """One call: blocked inputs, what to do with them, and the outputs that chunks fill in."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: BlockMask
    heads: int
    scale: float
    text_valid: torch.Tensor | None
    grad: bool
    bounded: bool
    finite: bool
    table: torch.Tensor
    powers: Callable[[Tensor], Tensor] | None
    out: torch.Tensor
    lse: torch.Tensor | None

    def compute(self, chunk: Chunk, part: Round, workspace: Workspace) -> None:
        """Attend from the query blocks of one chunk in some heads.

        Every operator called here releases and takes Python's lock, where threads wait for each other: hence
        index lists made beforehand and views that are kept.
        """
        bias = workspace.bias_of(chunk, self.table)
        space = workspace.views(len(part.first_key), *chunk.cols.shape, chunk.first_masked)
        dtype, row, key = self.q.dtype, part.query_blocks, part.keys
        if key is None:
            key = torch.add(part.first_key, chunk.cols.view(-1)).view(-1)
        q = self.q.index_select(0, row).view(space.q_shape)
        k = space.keys(self.k, key)
        factor = self.scale * LOG2_E if _in_base_2(dtype, self.grad) else self.scale
        scores = space.scores
        ignored = q.new_zeros(()) if scores is None else scores  # because of beta=0
        scores = torch.baddbmm(ignored, q, k.mT, beta=0, alpha=factor, out=scores)
        masked = space.masked(scores)  # [heads, rows, bq, L']
        if bias is not None:
            hide(masked, bias, self.finite)
        hides_text = self.text_valid is not None and chunk.touches_text
        if hides_text:
            heads = part.first_key[:, 0] // self.mask.num_cols
            valid = self.text_valid.index_select(0, heads // self.heads)
            hide(masked, text_bias(chunk, self.mask, valid, dtype), self.finite)
        dead = None
        # rows past the end have a gradient too, and scores may be -inf by themselves
        if chunk.may_attend_nothing or hides_text or self.grad or not self.finite:
            dead = scores.amax(-1, keepdim=True) == -math.inf
            scores.masked_fill_(dead, 0.0)
        v = space.keys(self.v, key)  # over K, still in cache
        out, lse = _attend(scores, v, self.grad, self.lse is not None, self.bounded, self.powers)
        out = out if dead is None else out.masked_fill(dead, 0.0)
        self.out.index_copy_(0, row, out.view(len(row), -1))
        if lse is not None:
            lse = lse.masked_fill(lse == math.inf, math.nan) if self.grad else lse
            lse = lse if dead is None else lse.masked_fill(dead, -math.inf)
            self.lse.index_copy_(0, row, lse.view(len(row), -1))


def _run(job: _Job, chunks: list[Chunk]) -> None:
    """Compute all chunks; on a CPU each thread takes whole rounds, free of parallel operators' barriers."""
    waiting = deque((chunk, part) for chunk in chunks for part in chunk.rounds)
    threads = min(torch.get_num_threads(), len(waiting)) if job.q.device.type == "cpu" else 1
    inference = torch.is_inference_mode_enabled()

    def work() -> None:
        workspace = Workspace(job.q, job.mask.block_size, reuse=not job.grad)
        with torch.inference_mode(inference):
            while waiting:
                try:
                    chunk, part = waiting.popleft()
                except IndexError:  # another thread took the last one
                    return
                job.compute(chunk, part, workspace)

    if threads < 2 or job.grad:
        work()
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread, and of those that start now
    try:
        with ThreadPoolExecutor(threads - 1) as pool:
            others = [pool.submit(work) for _ in range(threads - 1)]
            work()
        for other in others:
            other.result()
    finally:
        torch.set_num_threads(before)


def _attend(
    scores: torch.Tensor,
    v: torch.Tensor,
    grad: bool,
    want_lse: bool,
    bounded: bool,
    powers: Callable[[Tensor], Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """softmax(scores) v and, if wanted, lse (B, bq, 1); overwrites the scores unless gradients are needed."""
    if grad:
        return torch.bmm(scores.softmax(-1), v), scores.logsumexp(-1, keepdim=True) if want_lse else None
    if not _in_base_2(scores.dtype, grad):
        out = scores if scores.device.type == "cpu" else torch.empty_like(scores)
        return torch.bmm(torch.ops.aten._softmax.out(scores, -1, False, out=out), v), None
    if not bounded:
        top = scores.amax(-1, keepdim=True)
        scores.sub_(top)
    weights = torch.exp2(scores, out=scores) if powers is None else powers(scores)
    total = weights.sum(-1, keepdim=True)
    lse = None
    if want_lse:
        lse = (total.log2() if bounded else top + total.log2()) / LOG2_E
    return torch.bmm(weights, v).div_(total), lse


def _in_base_2(dtype: torch.dtype, grad: bool) -> bool:
    """Whether scores carry a factor log2(e), because exp2 is several times faster than exp on a CPU."""
    return dtype in (torch.float32, torch.float64) and not grad


def _compute_dtype(problem: Problem) -> torch.dtype:
    plain = problem.device.type != "cpu" and not problem.return_lse
    return problem.dtype if plain else torch.promote_types(problem.dtype, torch.float32)


def largest_score(q: torch.Tensor, k: torch.Tensor, scale: float) -> float:
    """A bound of all scores in base 2, not finite where one of them may not be.

    Below `_BOUND`, sums of their powers stay so far from float32's limits that the usual subtraction of each
    row's largest score, two passes over all of them, would change nothing: floating point is as precise at
    2^60 as at 1.
    """
    if not q.numel():
        return 0.0
    longest = [torch.linalg.vector_norm(x.detach(), dim=-1).amax() for x in (q, k)]
    return float(longest[0] * longest[1] * (abs(scale) * LOG2_E))


def hide(scores: torch.Tensor, bias: torch.Tensor, finite: bool) -> None:
    """Set scores to -inf where the bias is; adding it is faster, but leaves NaN."""
    if finite:
        scores.add_(bias)
    else:
        scores.masked_fill_(bias < 0, -math.inf)


def blocks_of(x: torch.Tensor, size: int) -> torch.Tensor:
    """(batch, heads, length, dim) to (batch * heads * blocks, size * dim), the last block zero-padded."""
    batch, heads, length, dim = x.shape
    short = -length % size
    x = F.pad(x, (0, 0, 0, short)) if short else x
    return x.reshape(batch * heads * ((length + short) // size), size * dim)


class Workspace:
    """One thread's working memory, which its chunks share; without reuse (autograd) each gets its own."""

    def __init__(self, q_blocks: torch.Tensor, block_size: tuple[int, int], reuse: bool):
        self.device, self.dtype, self.reuse = q_blocks.device, q_blocks.dtype, reuse
        self.block_size, self.dim = block_size, q_blocks.shape[1] // block_size[0]
        self.flat: dict[str, torch.Tensor] = {}
        self.known: dict[tuple[int, ...], _Views] = {}
        self.bias: tuple[Chunk | None, torch.Tensor | None] = (None, None)  # of the chunk computed last

    def take(self, name: str, *shape: int) -> torch.Tensor | None:
        if not self.reuse:
            return None
        size = math.prod(shape)
        if name not in self.flat or self.flat[name].numel() < size:
            self.flat[name] = torch.empty(size, device=self.device, dtype=self.dtype)
            self.known.clear()
        return self.flat[name][:size].view(shape)

    def bias_of(self, chunk: Chunk, table: torch.Tensor) -> torch.Tensor | None:
        """What to add to the masked columns of a chunk, or None."""
        if self.bias[0] is not chunk:
            self.bias = chunk, _tile_bias(chunk, table, self) if chunk.tiles.numel() else None
        return self.bias[1]

    def views(self, *shape: int) -> _Views:
        """Views for (heads, rows, listed key blocks, first masked one)."""
        if shape not in self.known:
            views = _Views(self, *shape)
            self.known[shape] = views
        return self.known[shape]


class _Views:
    """A workspace as chunks of one shape see it."""

    def __init__(self, workspace: Workspace, heads: int, rows: int, listed: int, first_masked: int):
        (bq, bk), dim = workspace.block_size, workspace.dim
        batches, length = heads * rows, listed * bk
        self.q_shape = (batches, bq, dim)
        self.k_shape = (batches, length, dim)
        self.gathered = workspace.take("kv", batches * listed, bk * dim)
        self.as_keys = None if self.gathered is None else self.gathered.view(self.k_shape)
        self.scores = workspace.take("scores", batches, bq, length)
        self.by_head = (heads, rows, bq, length)
        self.first = first_masked * bk
        self._masked = None if self.scores is None else self.masked_columns(self.scores)

    def keys(self, source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Gathered key blocks (batches, length, dim), valid until the next call."""
        gathered = torch.index_select(source, 0, index, out=self.gathered)
        return gathered.view(self.k_shape) if self.as_keys is None else self.as_keys

    def masked(self, scores: torch.Tensor) -> torch.Tensor:
        return self.masked_columns(scores) if self._masked is None else self._masked

    def masked_columns(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.view(self.by_head)[..., self.first :]


# -- masks as terms added to the scores ----------------------------------------------------------------------


def _as_bias(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bits (bq, n, bk / 8) to 0 where attended and -inf elsewhere: (bq, n, bk)."""
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    hidden = (packed.unsqueeze(-1) >> bits & 1 == 0).flatten(-2)
    return torch.zeros(hidden.shape, dtype=dtype, device=packed.device).masked_fill_(hidden, -math.inf)


@dataclass(frozen=True, eq=False)
class TileTable:
    """`packed_tiles` of a mask, already expanded by `_as_bias` unless there are too many."""

    table: torch.Tensor

    @classmethod
    def of(cls, mask: BlockMask, dtype: torch.dtype) -> TileTable:
        packed = packed_tiles(mask)
        small = packed.numel() * 8 * dtype.itemsize <= _BIAS_BYTES
        return cls(_as_bias(packed, dtype) if small else packed)


def _tile_bias(chunk: Chunk, table: torch.Tensor, workspace: Workspace) -> torch.Tensor:
    """What to add to the masked columns of a chunk: (rows, bq, L')."""
    if table.dtype == torch.uint8:
        bias = _as_bias(table.index_select(1, chunk.tiles.view(-1)), workspace.dtype)
    else:
        out = workspace.take("bias", len(table), chunk.tiles.numel(), table.shape[2])
        bias = torch.index_select(table, 1, chunk.tiles.view(-1), out=out)
    return bias.view(len(bias), len(chunk.rows), -1).transpose(0, 1)


def text_bias(chunk: Chunk, mask: BlockMask, valid: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What hides padded text in the masked columns, given each head's `valid`: (heads, rows, 1, L')."""
    (start, stop), bk = mask.text, mask.block_size[1]
    cols = chunk.cols[:, chunk.first_masked :]
    key = (cols.unsqueeze(-1) * bk + torch.arange(bk, device=cols.device)).flatten(1)[None, :, None]
    hidden = (key >= start + valid.view(-1, 1, 1, 1)) & (key < stop)
    return torch.zeros(hidden.shape, dtype=dtype, device=cols.device).masked_fill_(hidden, -math.inf)


BACKEND = Backend(
    "gather",
    attend,
    dtypes=(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    condition=lambda problem: None,
    block_sizes=block_sizes,
    automatic_on=None,
    formats=tuple(FORMATS),
    backward=True,
)
