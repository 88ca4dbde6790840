"""Block-sparse attention: one public function over interchangeable backends."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch

from dit_accel.blockmask import BlockMask
from dit_accel.errors import UnavailableError

from . import flex, gather, native, opaque

BACKENDS = ("triton", "native", "gather", "flex", "reference")
MAX_HEAD_DIM = 256

_log = logging.getLogger("dit_accel")


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    text_valid: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    quantization: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of each query to the keys that `mask` names, exact to the element.

    Args:
        q: (batch, heads, seq_len, head_dim) in kernel order (`mask.order`), fp16, bf16 or fp32 (float64 with
            the backends gather and reference), any strides, head_dim up to 256.
        k, v: (batch, heads, kv_len, head_dim), same dtype and device.
        mask: which keys; on the same device as q.
        scale: factor on the scores, head_dim^-0.5 unless given.
        text_valid: number of valid text tokens of each sample, integer (batch,), for padded text; None: all.
        return_lse: also return the log-sum-exp of the scaled scores.
        backend: `"triton"`, `"native"` (compiled for this CPU), `"gather"` (plain PyTorch), `"flex"`,
            `"reference"`, or `"auto"`: on a GPU Triton, on a CPU native, where they run, else gather. Only
            `"auto"` chooses; what is named runs or raises.
        quantization: None; quantised kernels are not available in this version.

    Returns:
        out (batch, heads, seq_len, head_dim) in q's dtype; with `return_lse` also lse (batch, heads, seq_len)
        in natural logarithm, fp32 (float64 for float64 inputs). Rows that attend nothing: out 0, lse -inf.

    Raises:
        ValueError, TypeError: tensors that do not fit each other or the mask, or an unknown backend.
        UnavailableError: a backend that cannot run with these inputs; the message says why.
    """
    _check_tensors(q, k, v, mask)
    if text_valid is not None:
        text_valid = _check_text_valid(text_valid, q, mask)
    inputs = {
        "device": q.device,
        "dtype": q.dtype,
        "head_dim": q.shape[3],
        "block_size": mask.block_size,
        "quantization": quantization,
        "return_lse": return_lse,
        "requires_grad": torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)),
    }
    reason = can_run(backend, **inputs)
    if reason is not None:
        raise UnavailableError(f"backend {backend!r} cannot run here: {reason}")
    chosen = backend
    compiling = torch.compiler.is_compiling()
    if backend == "auto":
        chosen, why = automatic_backend(**inputs)
        if not compiling:
            _log_choice(chosen, q.device.type, q.dtype, why)
    options = {"scale": q.shape[3] ** -0.5 if scale is None else float(scale), "text_valid": text_valid}
    if chosen == "triton":
        from . import triton

        out, lse = triton.attention(q, k, v, mask, **options)
    elif compiling and opaque.is_announced(mask) and not inputs["requires_grad"]:
        out, lse = opaque.attention(q, k, v, mask, backend=chosen, return_lse=return_lse, **options)
    else:  # in compiled code, a graph break
        out, lse = opaque.BACKENDS[chosen].attention(q, k, v, mask, return_lse=return_lse, **options)
    return (out, lse) if return_lse else out


def can_run(
    backend: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    block_size: tuple[int, int],
    quantization: str | None = None,
    return_lse: bool = False,
    requires_grad: bool = False,
) -> str | None:
    """Why `backend` (or `"auto"`) cannot run with such inputs, or None if it can.

    Raises:
        ValueError: an unknown backend.
    """
    if backend not in ("auto", *BACKENDS):
        names = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ValueError(f"`backend` must be one of {names}, got {backend!r}")
    device = torch.device(device)
    if quantization is not None:
        return f"quantization={quantization!r} is not available in this version; use quantization=None"
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        return f"head_dim must be between 1 and {MAX_HEAD_DIM}, got {head_dim}"
    if backend in ("auto", "gather"):
        return gather.unavailable(device, dtype)
    if backend == "native":
        return native.unavailable(device, dtype, tuple(block_size), requires_grad)
    if backend == "flex":
        return flex.unavailable(device, dtype, return_lse, requires_grad)
    if backend == "triton":
        return _triton_unavailable(device, dtype, head_dim, tuple(block_size), requires_grad)
    return None if dtype.is_floating_point else f"attention needs a floating-point dtype, got {dtype}"


def support_table(head_dim: int = 64, block_size: tuple[int, int] | None = None) -> list[dict[str, str]]:
    """What runs on this machine: per backend, device and dtype a `status`, "yes" or the reason why not."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows = []
    for backend in BACKENDS:
        for device in devices:
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                size = block_size or default_block_size(device)
                reason = can_run(backend, device=device, dtype=dtype, head_dim=head_dim, block_size=size)
                name = str(dtype).removeprefix("torch.")
                rows.append({"backend": backend, "device": device, "dtype": name, "status": reason or "yes"})
    return rows


def default_block_size(device: torch.device | str) -> tuple[int, int]:
    """The (query, key) block size that suits the automatic backend of a device whatever the mask."""
    return next(iter(block_sizes(device)))


def block_sizes(device: torch.device | str) -> dict[tuple[int, int], float]:
    """Block sizes worth trying on a device, the default first, with the relative time of a computed pair.

    On a CPU small blocks cost little more per pair and save padding; plain PyTorch wants larger ones, which
    gather less for each query. A GPU wants whole tiles.
    """
    if torch.device(device).type != "cpu":
        return {(128, 64): 1.0}
    if native.unavailable(torch.device("cpu"), torch.float32, (64, 16)) is None:
        return {(64, 16): 1.0, (32, 16): 1.06}
    return {(64, 16): 1.0, (128, 16): 0.89}


# -- backend choice ------------------------------------------------------------------------------------------


def automatic_backend(
    device: torch.device | str, dtype: torch.dtype, **inputs: Any
) -> tuple[str, str | None]:
    """The backend that `"auto"` stands for with such inputs (as for `can_run`), and why it is none better."""
    best = fastest_backend(device)
    reason = can_run(best, device=device, dtype=dtype, **inputs)
    return (best, None) if reason is None else ("gather", reason)


def fastest_backend(device: torch.device | str) -> str:
    """The fastest backend of a device type, which `"auto"` takes where it can run."""
    return "native" if torch.device(device).type == "cpu" else "triton"


@cache  # once per device type, dtype and reason
def _log_choice(chosen: str, device: str, dtype: torch.dtype, reason: str | None) -> None:
    if reason is None:
        _log.info("block_sparse_attention on %s, %s: backend %r", device, dtype, chosen)
    else:
        best = fastest_backend(device)
        text = "block_sparse_attention on %s, %s: backend %r, which is slower than %r: %s"
        _log.warning(text, device, dtype, chosen, best, reason)


def _triton_unavailable(device, dtype, head_dim, block_size, requires_grad) -> str | None:
    if requires_grad:
        return "the triton backend has no backward pass; use backend='gather'"
    try:
        from . import triton
    except ImportError as error:
        return f"Triton could not be imported ({error}); install it with `pip install triton`"
    return triton.unavailable(device, dtype, head_dim, block_size)


# -- validation ----------------------------------------------------------------------------------------------


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask) -> None:
    if not isinstance(mask, BlockMask):
        raise TypeError(f"`mask` must be a dit_accel.BlockMask, got {type(mask).__name__}")
    for name, x, field in (("q", q, "seq_len"), ("k", k, "kv_len"), ("v", v, "kv_len")):
        length = getattr(mask, field)
        if x.ndim != 4:
            raise ValueError(f"`{name}` must have shape (batch, heads, seq, head_dim), got {tuple(x.shape)}")
        if x.shape[2] != length:
            raise ValueError(
                f"`{name}` has {x.shape[2]} tokens but the mask was built for {field}={length}; "
                "build the mask for this layout"
            )
        if x.shape[:2] != q.shape[:2] or x.shape[3] != q.shape[3]:
            raise ValueError(
                f"`{name}` must agree with q in batch, heads and head_dim, got {tuple(x.shape)} against "
                f"{tuple(q.shape)}; repeat shared key and value heads first"
            )
        if x.dtype != q.dtype:
            raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
        if x.device != q.device:
            raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    if mask.device != q.device:
        raise ValueError(
            f"`mask` is on {mask.device} but q is on {q.device}; move it once with mask.to({str(q.device)!r})"
        )
    if mask.head_groups is not None and mask.head_groups.numel() != q.shape[1]:
        raise ValueError(f"`mask` is for {mask.head_groups.numel()} heads, got tensors with {q.shape[1]}")


def _check_text_valid(text_valid: torch.Tensor, q: torch.Tensor, mask: BlockMask) -> torch.Tensor:
    length = mask.text[1] - mask.text[0]
    if length == 0:
        raise ValueError("`text_valid` was given but the mask has no text; use a layout with text_len > 0")
    text_valid = torch.as_tensor(text_valid, device=q.device)
    if text_valid.shape != q.shape[:1] or text_valid.is_floating_point() or text_valid.is_complex():
        got = f"{text_valid.dtype} {tuple(text_valid.shape)}"
        raise ValueError(f"`text_valid` must be integers of shape ({q.shape[0]},), got {got}")
    return text_valid
