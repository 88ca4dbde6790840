"""Who computes attention in the GPU benchmark: dense providers to be held against, and block-sparse ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.kernels import block_sparse_attention, can_run
from dit_accel.kernels.block_sparse import fa4
from dit_accel.masks.block_mask import BlockMask

Run = Callable[[], Any]
Prepare = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, BlockMask], Run]


@dataclass(frozen=True)
class Provider:
    """One implementation of attention.

    Attributes:
        name: in tables and rows.
        prepare: (q, k, v, mask), tensors (B, H, S, D), to a call that gives (B, H, S, D); what a model would
            do beforehand, such as another layout of the tensors, is not part of the call.
        sparse: computes the mask, else all pairs.
        exact: in the dtype of its inputs throughout; quantised ones are shown, but are no yardstick.
        error: what one of ours that is not exact may have, relative L1 of normal inputs.
        tail: what it adds to the mask, as of `block_sparse_attention`.
        ours: a kernel of this project, whose results must be equal to the bit each time.
        package: what must be installed for it.
        block_size: gives that of the masks that it computes, on the GPU in use.
    """

    name: str
    prepare: Prepare
    sparse: bool = False
    exact: bool = True
    error: float | None = None
    tail: str | None = None
    ours: bool = False
    package: str = "torch"
    block_size: Callable[[], tuple[int, int]] = lambda: (128, 64)

    def missing(self) -> str | None:
        """Why it cannot be tried here, or None."""
        for depth in range(self.package.count(".") + 1):  # a package within another is looked up in it
            name = ".".join(self.package.split(".")[: depth + 1])
            if importlib.util.find_spec(name) is None:
                return f"{name} is not installed"
        return None


def sdpa(name: str, backend: SDPBackend) -> Provider:
    """PyTorch's dense attention with one of its backends."""

    def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask) -> Run:
        def run() -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v)

        return run

    return Provider(name, prepare)


def block_sparse(name: str, backend: str, *, package: str = "torch") -> Provider:
    """A backend of `block_sparse_attention`."""

    def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask) -> Run:
        return partial(block_sparse_attention, q, k, v, mask, backend=backend)

    return Provider(name, prepare, sparse=True, ours=True, package=package)


def quantized(backend: str, format: str, error: float, *, package: str = "torch") -> Provider:
    """A backend of `block_sparse_attention` in a numeric format; quantizing is part of the call."""

    def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask) -> Run:
        return partial(block_sparse_attention, q, k, v, mask, backend=backend, quantization=format)

    name = f"{backend}-{format}"
    return Provider(name, prepare, sparse=True, exact=False, error=error, ours=True, package=package)


def tailed(backend: str, tail: str = "pooled", *, package: str = "torch") -> Provider:
    """A backend of `block_sparse_attention` with the compensated tail, which it merges or computes itself."""

    def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask) -> Run:
        return partial(block_sparse_attention, q, k, v, mask, backend=backend, tail=tail)

    name, what = f"{backend}-tail", {"sparse": True, "exact": False, "error": 0.01, "tail": tail}
    return Provider(name, prepare, **what, ours=True, package=package)


def _flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask) -> Run:
    """FlexAttention compiled anew for this mask.

    From the ninth mask on `torch.compile` would go on without compiling, with a dense score matrix:
    `fullgraph` makes that an error, and starting anew each time keeps it from happening.
    """
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return partial(compiled, q, k, v, block_mask=mask.to_flex())


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask) -> Run:
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return lambda: flash_attn_func(q, k, v).transpose(1, 2)


def _flash4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask) -> Run:
    """FlashAttention-4 on all pairs."""
    from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]

    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return lambda: flash_attn_func(q, k, v)[0].transpose(1, 2)


def _fa4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask) -> Run:
    """FlashAttention-4 on a mask's blocks."""
    return partial(block_sparse_attention, q, k, v, mask, backend="fa4")


def _fa4_blocks() -> tuple[int, int]:
    """What it takes on the GPU in use; where it takes none, any, and it then says so."""
    major, _ = torch.cuda.get_device_capability()
    return fa4.BLOCK_SIZES.get(major, (128, 128))


def _xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask) -> Run:
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return lambda: memory_efficient_attention(q, k, v).transpose(1, 2)


def _sage(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask) -> Run:
    from sageattention import sageattn  # pyright: ignore[reportMissingImports]

    return partial(sageattn, q, k, v, tensor_layout="HND", is_causal=False)


ERRORS = {"int8": 0.03, "int8-fp8": 0.06, "int8-int8": 0.04, "int8-int4": 0.25}
OTHER_KERNELS = ("triton-tma", "triton-gluon")  # of ours in Triton, beside the one that "auto" takes
PROVIDERS = {
    provider.name: provider
    for provider in (
        sdpa("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
        sdpa("sdpa-flash", SDPBackend.FLASH_ATTENTION),
        sdpa("sdpa-math", SDPBackend.MATH),
        Provider("flash-attn", _flash, package="flash_attn"),
        Provider("flash-attn-4", _flash4, package="flash_attn.cute"),
        Provider("fa4", _fa4, sparse=True, package="flash_attn.cute", block_size=_fa4_blocks),
        Provider("xformers", _xformers, package="xformers"),
        Provider("sageattention", _sage, exact=False, package="sageattention"),
        Provider("flex", _flex, sparse=True),
        block_sparse("triton", "triton", package="triton"),
        *(block_sparse(name, name, package="triton") for name in OTHER_KERNELS),
        block_sparse("gather", "gather"),
        *(quantized("triton", format, error, package="triton") for format, error in ERRORS.items()),
        *(quantized(name, "int8", ERRORS["int8"], package="triton") for name in OTHER_KERNELS),
        quantized("triton-tma", "int8-fp8", ERRORS["int8-fp8"], package="triton"),
        *(tailed(name, package="triton") for name in ("triton", *OTHER_KERNELS)),
        tailed("gather"),
        *(quantized("gather", format, error) for format, error in ERRORS.items()),
    )
}


def kernel(device: str) -> str:
    """The provider that is ours: Triton, and plain PyTorch in its place in a rehearsal without a GPU."""
    reason = can_run("triton", device=device, dtype=torch.float32, head_dim=64, block_size=(128, 64))
    return "gather" if device == "cpu" and reason else "triton"
