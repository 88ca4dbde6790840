"""Problems for block-sparse attention, and the rule by which a backend solves them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dit_accel import BlockMask
from dit_accel.kernels import block_sparse_attention
from dit_accel.kernels.block_sparse import reference

THRESHOLD = 6.0  # in base 2, of values that are left out of `far_apart`
SHORT = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Case:
    """One problem: sizes, mask and dtype."""

    seq: int
    dtype: torch.dtype = torch.float32
    batch: int = 1
    heads: int = 2
    dim: int = 64
    extra_keys: int = 0
    block_size: tuple[int, int] = (64, 16)
    per_head: bool = False
    per_sample: bool = False
    text: int = 0
    text_valid: tuple[int, ...] | None = None
    density: float = 0.2
    strided: bool = False

    def __str__(self) -> str:
        parts = [f"B{self.batch}", f"H{self.heads}", f"N{self.seq}", f"D{self.dim}", SHORT[self.dtype]]
        parts += [f"K{self.seq + self.extra_keys}"] * bool(self.extra_keys)
        parts += ["x".join(map(str, self.block_size))]
        parts += ["heads"] * self.per_head + ["samples"] * self.per_sample + ["strided"] * self.strided
        parts += [f"T{self.text}"] * bool(self.text)
        parts += ["valid" + "_".join(map(str, self.text_valid or ()))] * (self.text_valid is not None)
        return "-".join(parts)

    def mask(self) -> BlockMask:
        """Random, with full blocks, absent blocks and rows that attend nothing; text in the last tokens."""
        generator = torch.Generator().manual_seed(self.seq)
        keys = self.seq + self.extra_keys
        differ = ((self.batch,) if self.per_sample else ()) + ((self.heads,) if self.per_head else ())
        bits = torch.rand(*differ, self.seq, keys, generator=generator) < self.density
        bits[..., : self.seq // 3, : keys // 2] = True
        bits[..., self.seq // 2 :, : keys // 4] = False
        bits[..., -1, -1] = True
        if self.seq > 16:
            bits[..., 9:13, :] = False
            bits[..., self.seq // 2 : self.seq // 2 + self.block_size[0] * 2, :] &= self.seq < 200
        if self.text:
            bits[..., self.seq - self.text : self.seq] = True
        text = (self.seq - self.text, self.seq) if self.text else (0, 0)
        return BlockMask.from_token_mask(bits, self.block_size, text)

    def inputs(self) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        lengths = (self.seq, self.seq + self.extra_keys, self.seq + self.extra_keys)
        if self.strided:  # (batch, seq, heads, dim), as attention layers hold them, with a gap between tokens
            wide = (
                torch.randn(self.batch, n, self.heads, 2 * self.dim, generator=generator) for n in lengths
            )
            return [x.to(self.dtype)[..., : self.dim].transpose(1, 2) for x in wide]
        shapes = ((self.batch, self.heads, n, self.dim) for n in lengths)
        return [torch.randn(*shape, generator=generator).to(self.dtype) for shape in shapes]

    def valid(self) -> torch.Tensor | None:
        return None if self.text_valid is None else torch.tensor(self.text_valid)


def plain(q, k, v, allowed, scale):
    """Ordinary attention, all of it in the dtype of its inputs."""
    scores = (q @ k.mT * scale).masked_fill(~allowed, -math.inf)
    nothing = ~allowed.any(-1, keepdim=True)
    return scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0) @ v


def error(result, expected) -> float:
    return (result - expected).abs().max().item()


def check(case: Case, backend: str, with_lse: bool = True) -> None:
    """Error against float64 at most twice that of plain attention in the same dtype, plus eps."""
    q, k, v = case.inputs()
    mask, valid, scale = case.mask(), case.valid(), case.dim**-0.5
    exact = [x.double() for x in (q, k, v)]
    expected, expected_lse = reference.attention(*exact, mask, scale=scale, text_valid=valid)
    allowed = reference.dense_mask(mask, case.batch, case.heads, valid)
    rounding = torch.finfo(case.dtype).eps * expected.abs().max().item()
    tolerance = 2 * error(plain(q, k, v, allowed, scale), expected) + rounding
    result = block_sparse_attention(q, k, v, mask, text_valid=valid, backend=backend)
    assert result.shape == q.shape
    assert result.dtype == q.dtype
    assert error(result, expected) <= tolerance
    if not with_lse:
        return
    again, lse = block_sparse_attention(q, k, v, mask, text_valid=valid, backend=backend, return_lse=True)
    assert error(again, expected) <= tolerance
    assert lse.dtype == torch.promote_types(q.dtype, torch.float32)
    single = [x.to(lse.dtype) for x in (q, k)]
    plain_lse = (single[0] @ single[1].mT * scale).masked_fill(~allowed, -math.inf).logsumexp(-1)
    finite = expected_lse.isfinite()
    assert torch.equal(lse == -math.inf, ~finite)
    rounding = torch.finfo(lse.dtype).eps * expected_lse[finite].abs().max().item()
    plain_error = error(plain_lse[finite], expected_lse[finite])
    assert error(lse[finite], expected_lse[finite]) <= 2 * plain_error + rounding


def check_tail(case: Case, backend: str) -> None:
    """Error against float64 at most twice that of the reference in the inputs' dtype, plus eps."""
    q, k, v = case.inputs()
    mask, valid = case.mask(), case.valid()
    options = {"scale": case.dim**-0.5, "text_valid": valid, "tail": "pooled"}
    expected, expected_lse = reference.attention(q.double(), k.double(), v.double(), mask, **options)
    plain, plain_lse = reference.attention(q, k, v, mask, **options)
    out, lse = block_sparse_attention(q, k, v, mask, backend=backend, return_lse=True, **options)
    again = block_sparse_attention(q, k, v, mask, backend=backend, **options)
    eps = torch.finfo(case.dtype).eps
    rounding = 2 * eps * expected.abs().max().item()
    assert out.dtype == again.dtype == q.dtype
    assert error(out, expected) <= 2 * error(plain, expected) + rounding
    assert error(again, expected) <= 2 * error(plain, expected) + rounding
    finite = expected_lse.isfinite()
    assert torch.equal(lse == -math.inf, ~finite)
    assert lse.dtype == torch.promote_types(q.dtype, torch.float32)
    # keys and their means are rounded to the inputs' dtype where the backend multiplies in it
    slack = torch.finfo(lse.dtype).eps * 4 * expected_lse[finite].abs().max() + (
        0 if case.dtype in (torch.float32, torch.float64) else eps
    )
    assert (
        error(lse[finite], expected_lse[finite]) <= 2 * error(plain_lse[finite], expected_lse[finite]) + slack
    )


LENGTHS = [
    Case(n, batch=2, dtype=t) for n in (1, 63, 128, 300, 1027) for t in (torch.float32, torch.bfloat16)
]


def gradients(inputs, mask, valid, dout, dlse, **options):
    """Of a loss that the output and the log-sum-exp, where it is finite, have a part in."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out, lse = block_sparse_attention(*inputs, mask, text_valid=valid, return_lse=True, **options)
    lse = torch.where(lse.isfinite(), lse, 0.0)
    loss = (out * dout.to(out.dtype)).sum() + (lse * dlse.to(lse.dtype)).sum()
    return torch.autograd.grad(loss, inputs)


def check_gradients(inputs, mask, valid, backend: str, tail: str | None = None, scale=None) -> None:
    """Gradients are off by at most twice what the specification's in that dtype are, plus eps of the largest.

    What a backend leaves unwritten is NaN.
    """
    q, generator = inputs[0], torch.Generator().manual_seed(3)
    dout, dlse = (torch.randn(shape, generator=generator).to(q) for shape in (q.shape, q.shape[:3]))
    given, options = (mask, valid, dout, dlse), {"tail": tail, "scale": scale}
    expected = gradients([x.double() for x in inputs], *given, backend="reference", **options)
    plain = gradients(inputs, *given, backend="reference", **options)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(8, device=q.device).isnan().all(), "results are not poisoned"
        found = gradients(inputs, *given, backend=backend, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    eps = torch.finfo(q.dtype).eps
    for name, one, other, truth in zip("qkv", found, plain, expected, strict=True):
        assert one.dtype == q.dtype
        assert one.shape == truth.shape
        error, allowed = ((x - truth).abs().max().item() for x in (one, other))
        allowed = 2 * allowed + eps * truth.abs().max().item()
        assert error <= allowed, f"d{name}: error {error:.3g}, allowed {allowed:.3g}"
    nothing = ~reference.dense_mask(mask, *q.shape[:2], valid).any(-1).expand(q.shape[:3])
    if tail is None:
        assert (found[0][nothing] == 0).all(), "a query that attends nothing has a gradient"


VARIANTS = [
    Case(300, torch.float16),
    Case(300, torch.bfloat16, strided=True, batch=2),
    Case(300, strided=True, dim=40),
    Case(300, dim=256),
    Case(300, dim=8, block_size=(16, 8)),
    Case(300, block_size=(128, 64)),
    Case(300, torch.bfloat16, block_size=(128, 128)),
    Case(300, heads=3, per_head=True, batch=2),
    Case(300, torch.bfloat16, heads=3, per_head=True, text=40, text_valid=(5,)),
    Case(300, batch=3, heads=2, per_head=True, per_sample=True, text=40, text_valid=(5, 40, 0)),
    Case(300, extra_keys=77),
    Case(300, batch=2, text=40, text_valid=(40, 0)),
    Case(300, torch.bfloat16, batch=2, text=40, text_valid=(17, 1)),
    Case(300, batch=2, text=40, text_valid=(3, 0), density=0.0),
    Case(300, density=0.0),
]


def relative_l1(result, expected) -> float:
    """Sum of errors over sum of magnitudes; 0 of nothing."""
    result, expected = result.double(), expected.double()
    return ((result - expected).abs().sum() / expected.abs().sum().clamp(min=1e-30)).item()


def check_quantized(case: Case, backend: str, format: str, slack: float = 2e-4) -> None:
    """What the reference computes in the format, but for roundings that fall the other way (`slack`)."""
    q, k, v = case.inputs()
    mask, valid = case.mask(), case.valid()
    options = {"text_valid": valid, "quantization": format}
    expected, expected_lse = block_sparse_attention(
        q, k, v, mask, backend="reference", return_lse=True, **options
    )
    out, lse = block_sparse_attention(q, k, v, mask, backend=backend, return_lse=True, **options)
    again = block_sparse_attention(q, k, v, mask, backend=backend, **options)
    eps = torch.finfo(case.dtype).eps
    assert out.dtype == again.dtype == q.dtype
    assert out.shape == again.shape == q.shape
    assert relative_l1(out, expected) <= slack + eps
    assert relative_l1(again, expected) <= slack + eps
    assert error(out, expected) <= (50 * slack + 4 * eps) * max(1.0, v.abs().max().item())
    finite = expected_lse.isfinite()
    assert lse.dtype == torch.promote_types(q.dtype, torch.float32)
    assert torch.equal(lse == -math.inf, ~finite)
    assert (out[~finite] == 0).all()
    if finite.any():
        assert error(lse[finite], expected_lse[finite]) <= 10 * slack + eps


QUANTIZED = [
    *(Case(n, batch=2) for n in (1, 63, 128, 1027)),
    Case(300, torch.float16),
    Case(300, torch.bfloat16, strided=True, batch=2),
    Case(300, strided=True, dim=40),
    Case(300, dim=16, block_size=(64, 32)),
    Case(300, torch.bfloat16, dim=256),
    Case(300, block_size=(128, 64)),
    Case(300, torch.bfloat16, block_size=(128, 128)),
    Case(300, torch.bfloat16, heads=3, per_head=True, text=40, text_valid=(5,)),
    Case(300, batch=3, heads=2, per_head=True, per_sample=True, text=40, text_valid=(5, 40, 0)),
    Case(300, extra_keys=77),
    Case(300, batch=2, text=40, text_valid=(3, 0), density=0.0),
    Case(300, density=0.0),
]


def far_apart(block_size, seq=200, keys=450, dim=32, dtype=torch.float64):
    """Keys that differ by blocks in how large their scores are; full, partial and absent blocks."""
    generator = torch.Generator().manual_seed(0)
    q = 0.3 * torch.randn(2, 2, seq, dim, generator=generator, dtype=torch.float64)
    k = 0.3 * torch.randn(2, 2, keys, dim, generator=generator, dtype=torch.float64)
    q[..., 0] += 4
    k[..., 0] += 40 * torch.rand(-(-keys // 32), generator=generator).repeat_interleave(32)[:keys]
    v = torch.randn(2, 2, keys, dim, generator=generator, dtype=torch.float64)
    (bq, bk) = block_size
    kind = torch.randint(3, (2, -(-seq // bq), -(-keys // bk)), generator=generator)
    kind = kind.repeat_interleave(bq, 1).repeat_interleave(bk, 2)[:, :seq, :keys]
    bits = torch.where(kind == 2, torch.rand(kind.shape, generator=generator) < 0.3, kind == 1)
    bits[:, 5] = False
    return *(x.to(dtype) for x in (q, k, v)), BlockMask.from_token_mask(bits, block_size)
