"""What the compile report compiles: on which chips, with which head_dims, blocks, formats and kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dit_accel.kernels.block_sparse.formats import FORMATS


@dataclass(frozen=True)
class Chip:
    """What a chip offers: shared memory per program (bytes), and its best tensor-core instruction."""

    capability: tuple[int, int]
    shared: int
    instruction: str


CHIPS = {
    "sm_80": Chip((8, 0), 163 * 1024, "mma.sync"),
    "sm_90": Chip((9, 0), 227 * 1024, "wgmma"),
    "sm_100": Chip((10, 0), 227 * 1024, "tcgen05"),
    "sm_120": Chip((12, 0), 99 * 1024, "mma.sync"),
}
GATED_HEAD_DIMS = (64, 128)
PARTS = ("forward", "dq", "dkv")
KERNELS = {"pointer": tuple(CHIPS), "tma": ("sm_90", "sm_100"), "gluon": ("sm_90",)}  # forward, their chips


@dataclass(frozen=True)
class Case:
    """One compiled configuration.

    Attributes:
        text: a launch with a text length per sample.
        format: quantized.
        part: of attention: the forward pass, or what gives dQ, or dK and dV.
        kernel: of those that compute it (`KERNELS`).
        ping_pong: of the one in Gluon; that it is persistent changes its grid alone.
    """

    chip: str
    head_dim: int
    dtype: str
    block_size: tuple[int, int] = (128, 64)
    text: bool = False
    format: str | None = None
    part: str = "forward"
    kernel: str = "pointer"
    ping_pong: bool = False

    @property
    def products(self) -> tuple[str, ...]:
        """Of what numbers its tensor-core instructions have to be, beside those of 16 bits."""
        if self.format is None:
            return ()
        return ("s8", "e4m3") if self.format == "int8-fp8" else ("s8",)

    @property
    def all_integers(self) -> bool:
        """Whether all that it multiplies is integers."""
        format = FORMATS.get(self.format or "")
        return format is not None and format.values is not None and not format.dtype.is_floating_point


def _backward(chip: str, head_dims: tuple[int, ...], *options: Any, text: bool = False) -> Iterator[Case]:
    """A chip's cases of the backward pass."""
    for head_dim in head_dims:
        yield from (Case(chip, head_dim, *options, text=text, part=part) for part in PARTS[1:])


def _quantized(chip: str, head_dims: tuple[int, ...], **options: Any) -> Iterator[Case]:
    """A chip's cases in every format that it computes."""
    for format in FORMATS:
        if format != "int8-fp8" or CHIPS[chip].capability >= (8, 9):
            yield from (Case(chip, d, "bf16", format=format, **options) for d in head_dims)


def _others(chip: str, head_dims: tuple[int, ...]) -> Iterator[Case]:
    """A chip's cases of the kernels beside the one with pointers, on blocks of 64 and of 128 keys."""
    for kernel in list(KERNELS)[1:]:
        if chip not in KERNELS[kernel]:
            continue
        for keys in (64,) if kernel == "gluon" else (64, 128):
            for head_dim in head_dims:
                if kernel != "gluon" or head_dim <= 128:
                    yield Case(chip, head_dim, "bf16", (128, keys), text=True, kernel=kernel)
                if keys == 64 and head_dim in GATED_HEAD_DIMS:
                    formats = ("int8", "int8-fp8") if kernel == "tma" else ("int8",)
                    yield from (Case(chip, head_dim, "bf16", format=f, kernel=kernel) for f in formats)
                if kernel == "tma" and keys == 64:
                    options = (128, keys), True, None
                    yield from (Case(chip, head_dim, "bf16", *options, part, kernel) for part in PARTS[1:])
                if kernel == "gluon" and head_dim in GATED_HEAD_DIMS:
                    yield Case(chip, head_dim, "bf16", text=True, kernel=kernel, ping_pong=True)
                    yield Case(chip, head_dim, "bf16", format="int8", kernel=kernel, ping_pong=True)


GATE = tuple(
    Case(chip, head_dim, "bf16", text=text)
    for chip in CHIPS
    for head_dim in GATED_HEAD_DIMS
    for text in (False, True)
) + tuple(
    case
    for chip in CHIPS
    for case in (
        *(Case(chip, d, "fp32") for d in GATED_HEAD_DIMS),
        *_quantized(chip, GATED_HEAD_DIMS),
        *_backward(chip, GATED_HEAD_DIMS, "bf16", text=True),
        *_backward(chip, GATED_HEAD_DIMS, "fp32"),
        *_others(chip, GATED_HEAD_DIMS),
    )
)
ALL = GATE + tuple(
    case
    for chip in CHIPS
    for case in (
        *(Case(chip, d, "bf16", text=text) for d in (16, 32, 72, 96, 256) for text in (False, True)),
        *(Case(chip, d, "fp16") for d in (16, 32, 64, 72, 96, 128, 256)),
        Case(chip, 256, "fp32"),
        Case(chip, 128, "fp32", text=True),
        *(Case(chip, 128, "bf16", block_size) for block_size in ((64, 64), (128, 32), (128, 128))),
        *_quantized(chip, (72, 256)),
        *_quantized(chip, (128,), text=True),
        *_quantized(chip, (128,), block_size=(64, 32)),
        *_backward(chip, (72, 256), "bf16"),
        *_backward(chip, (128,), "fp16"),
        *_backward(chip, (256,), "fp32"),
        *(case for size in ((64, 32), (128, 128)) for case in _backward(chip, (128,), "bf16", size)),
        *_others(chip, (72, 256)),
    )
)
