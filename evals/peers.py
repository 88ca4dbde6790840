"""Who computes attention in the GPU benchmark: dense providers to be held against, and block-sparse ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..blockmask import BlockMask
from ..kernels import block_sparse_attention

Run = Callable[[], torch.Tensor]
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
        ours: must run; others are named with the reason where they do not.
        package: what must be installed for it.
    """

    name: str
    prepare: Prepare
    sparse: bool = False
    exact: bool = True
    ours: bool = False
    package: str = "torch"

    def missing(self) -> str | None:
        """Why it cannot be tried here, or None."""
        if importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return None


def sdpa(name: str, backend: SDPBackend) -> Provider:
    """PyTorch's dense attention with one of its backends."""

    def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask) -> Run:
        def run() -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v)

        return run

    return Provider(name, prepare)


def block_sparse(name: str, backend: str, *, ours: bool = False, package: str = "torch") -> Provider:
    """A backend of `block_sparse_attention`."""

    def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask) -> Run:
        return partial(block_sparse_attention, q, k, v, mask, backend=backend)

    return Provider(name, prepare, sparse=True, ours=ours, package=package)


def _xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask) -> Run:
    from xformers.ops import memory_efficient_attention

    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return lambda: memory_efficient_attention(q, k, v).transpose(1, 2)


def _sage(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask) -> Run:
    from sageattention import sageattn

    return partial(sageattn, q, k, v, tensor_layout="HND", is_causal=False)


PROVIDERS = (
    sdpa("sdpa-flash", SDPBackend.FLASH_ATTENTION),
    sdpa("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
    Provider("xformers", _xformers, package="xformers"),
    Provider("sageattention", _sage, exact=False, package="sageattention"),
    block_sparse("flex", "flex"),
    block_sparse("triton", "triton", ours=True, package="triton"),
)
