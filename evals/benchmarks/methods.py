"""Sparse attention methods by one knob each, and the knob at which a method computes a wanted share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dit_accel.masks.layout import TokenLayout
from dit_accel.patterns import (
    Clear,
    Clustered,
    Neighborhood,
    Pattern,
    Radial,
    Rectified,
    Routed,
    SparseVideoGen,
)

CLOSE = 0.1  # relative difference of densities that is near enough


@dataclass(frozen=True)
class Method:
    """A published method.

    Attributes:
        name: as tables say it.
        at: the pattern at a knob from 0 to 1, with which what it computes grows.
        video, image: what it is for.
        tail: whether it can have a tail; `Rectified` stands for what is left out already.
    """

    name: str
    at: Callable[[float, TokenLayout], Pattern]
    video: bool = True
    image: bool = True
    tail: bool = True


def _window(share: float, layout: TokenLayout) -> Neighborhood:
    axes = sum(n > 1 for n in layout.grid)
    return Neighborhood(tuple(min(n, max(2, round(n * share ** (1 / axes)))) for n in layout.grid))


def _disc(share: float, layout: TokenLayout) -> Clear:
    _, rows, columns = layout.grid
    return Clear(max(1.0, round((share * rows * columns / 2) ** 0.5, 1)))  # cut at the borders


def _rectified(share: float, layout: TokenLayout) -> Rectified:
    size = 64
    least = max(1, round(share * layout.visual_len / size))
    return Rectified(mass=1e-6, least=least, neighbours=False, block_size=size)


def _clustered(share: float, layout: TokenLayout) -> Clustered:
    clusters = (max(2, layout.visual_len // tokens) for tokens in (128, 64))
    return Clustered(*clusters, top_p=max(share, 1e-6), least=1e-6, iterations=(10, 2))


def _antidiagonal(share: float, layout: TokenLayout) -> Routed:
    return Routed(top_p=share, crossing=True, score="antidiagonal", stride=8, block_size=(64, 64))


METHODS = (
    Method("Neighborhood", _window),
    Method("CLEAR", _disc, video=False),
    Method("Radial", lambda share, _: Radial(decay_factor=2 * share, block_size=32), image=False),
    Method("Sparse VideoGen", lambda share, _: SparseVideoGen(keep=share), image=False),
    Method("Routed, top k", lambda share, _: Routed(top_k=share, block_size=(64, 32))),
    Method("XAttention", _antidiagonal),
    Method("Clustered", _clustered),
    Method("Rectified", _rectified, tail=False),
    Method(
        "Rectified on Routed",
        lambda share, _: Rectified(Routed(top_k=share, block_size=(64, 32))),
        tail=False,
    ),
)


def of_kind(video: bool) -> list[Method]:
    """The methods for videos, or for images."""
    return [method for method in METHODS if (method.video if video else method.image)]


def fitted(
    method: Method,
    wanted: float,
    layout: TokenLayout,
    measure: Callable[[Pattern], float],
    tries: int = 8,
) -> Pattern | None:
    """The method's pattern whose density, as `measure` says it, is nearest to the wanted one, by bisection.

    None where no knob is within twice `CLOSE`, as where text or the smallest window alone are more.
    """
    low, high, knob, found = 0.0, 1.0, wanted, []
    for _ in range(tries):
        try:
            pattern = method.at(knob, layout)
            density = measure(pattern)
        except ValueError:  # too little for this layout, such as a band narrower than a token
            low, knob = knob, (knob + high) / 2
            continue
        found.append((abs(density / wanted - 1), pattern))
        if found[-1][0] <= CLOSE:
            break
        low, high = (knob, high) if density < wanted else (low, knob)
        knob = (low + high) / 2
    difference, pattern = min(found, key=lambda one: one[0], default=(1.0, None))
    return pattern if difference <= 2 * CLOSE else None
