"""Generalized neighborhood attention: sliding, strided, dilated, blocked and causal windows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dit_accel.arguments import per_axis, shown
from dit_accel.masks.layout import TokenLayout

from .base import AxisWise, Grid, whole_axis


@dataclass(frozen=True)
class Neighborhood(AxisWise):
    """Each query attends to `window` keys per axis; windows slide inward at the borders and never shrink.

    With positions of one dilation group numbered idx = 0 .. L - 1, the window of a query is centred on its
    leader, min(floor(idx / stride) * stride + floor(stride / 2), L - 1), and clamped into [0, L). A stride
    equal to the window is blocked attention. On a causal axis the leader is the last query of the stride and
    keys after idx are dropped. Every token is in its own window.

    Args:
        window: keys per axis; an int for every axis longer than 1, or a tuple for the grid's last 1, 2 or 3
            axes, the leading axes then being attended in full.
        stride: queries that share a window, per axis, between 1 and the window.
        dilation: distance between the keys of a window, per axis; window * dilation must not exceed the axis.
        is_causal: whether keys after the query are dropped, per axis.

    Raises:
        ValueError: window under 2, stride out of range, dilation under 1, or the wrong number of entries; and
            when applied to a layout, a window (times dilation) larger than its axis.

    Source: Hassani et al., "Generalized Neighborhood Attention", 2025, and NATTEN.
    """

    window: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    is_causal: bool | tuple[bool, ...] = False

    @property
    def hides(self) -> bool:
        """Whether it is causal: what comes later must not be seen."""
        return any(self.is_causal) if isinstance(self.is_causal, tuple) else self.is_causal

    @property
    def row_reach(self) -> int | None:
        """Half a window; none where windows are set by more than their query's place: strides, dilation."""
        rows, others = self._window_rows, (self.stride, self.dilation)
        plain = not self.hides and all(set(x if isinstance(x, tuple) else (x,)) == {1} for x in others)
        return rows // 2 if plain and rows is not None else None

    @property
    def band_rows(self) -> int:
        """At a border of the picture a window lies on one side of its query."""
        reach, rows = self.row_reach, self._window_rows
        other_side = 0 if reach is None or rows is None else rows - reach
        return max(super().band_rows, other_side)

    @property
    def _window_rows(self) -> int | None:
        if isinstance(self.window, tuple):
            return self.window[-2] if len(self.window) > 1 else None
        return self.window

    def __post_init__(self):
        for name in ("window", "stride", "dilation", "is_causal"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        axes = len(self.window) if isinstance(self.window, tuple) else 1
        if not 1 <= axes <= 3:
            raise ValueError(f"`window` must have 1 to 3 entries, got {shown(self.window)}")
        parameters = self._parameters(axes) if isinstance(self.window, tuple) else self._scalars()
        for window, stride, dilation, _ in parameters:
            if window < 1:
                raise ValueError(f"`window` must be positive, got {shown(self.window)}")
            if not 1 <= stride <= window:
                raise ValueError(f"`stride` must be between 1 and the window ({window}), got {stride}")
            if dilation < 1:
                raise ValueError(f"`dilation` must be at least 1, got {dilation}")
        for name, kind in (("window", int), ("stride", int), ("dilation", int), ("is_causal", bool)):
            value = getattr(self, name)
            value = tuple(map(kind, value)) if isinstance(value, tuple) else kind(value)
            object.__setattr__(self, name, value)

    def _parameters(self, axes: int) -> list[tuple[int, int, int, bool]]:
        """(window, stride, dilation, is_causal) of each windowed axis."""
        values = [per_axis(n, getattr(self, n), axes) for n in ("window", "stride", "dilation")]
        return list(zip(*values, per_axis("is_causal", self.is_causal, axes, bool), strict=True))

    def _scalars(self) -> list[tuple[int, int, int, bool]]:
        lengths = {len(v) for v in (self.stride, self.dilation, self.is_causal) if isinstance(v, tuple)}
        if len(lengths) > 1 or not lengths <= {1, 2, 3}:
            raise ValueError(
                "`stride`, `dilation` and `is_causal` must have the same number of entries, 1 to 3"
            )
        return self._parameters(lengths.pop() if lengths else 1)

    def _windowed(self, layout: TokenLayout) -> list[tuple[int, int, int, bool] | None]:
        """The parameters of each of the three axes, None where the axis is attended in full."""
        given = [
            len(v) for v in (self.window, self.stride, self.dilation, self.is_causal) if isinstance(v, tuple)
        ]
        if not given:
            return [None if length == 1 else self._parameters(1)[0] for length in layout.grid]
        return [None] * (3 - given[0]) + self._parameters(given[0])

    def axis_tables(self, layout: TokenLayout) -> list[torch.Tensor]:
        tables = []
        for axis, length, parameters in zip("FHW", layout.grid, self._windowed(layout), strict=True):
            if parameters is None:
                tables.append(whole_axis(length))
                continue
            window, stride, dilation, causal = parameters
            if window * dilation > length:
                raise ValueError(
                    f"`window` {window} x dilation {dilation} exceeds axis {axis} of grid {layout.grid}, "
                    f"which has {length} tokens; use a smaller window or a larger size"
                )
            if window < 2 and length > 1:
                raise ValueError(
                    f"`window` must be at least 2 on axis {axis} with {length} tokens, got {window}"
                )
            tables.append(axis_table(length, window, stride, dilation, causal))
        return tables

    def natural_tiles(self, layout: TokenLayout) -> list[Grid]:
        frames, rows, columns = (1 if p is None else p[1] for p in self._windowed(layout))
        return [(frames, rows, columns)] if max(frames, rows, columns) > 1 else []


def axis_table(
    length: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False
) -> torch.Tensor:
    """Which keys each query of one axis attends to: bool (length, length)."""
    q = torch.arange(length, device="cpu")
    group, idx = q % dilation, q // dilation
    members = length // dilation + (group < length % dilation)  # L, tokens in the query's dilation group
    first = idx // stride * stride
    if causal:
        leader = torch.minimum(first + stride - 1, members - 1)
        start, stop = (leader - window + 1).clamp(min=0), idx + 1
    else:
        leader = torch.minimum(first + stride // 2, members - 1)
        right = window // 2 - 1 + window % 2
        overhang = torch.where(leader + right >= members, members - right - leader - 1, 0)
        start = (leader - window // 2).clamp(min=0) + overhang
        stop = start + window
    k_group, k_idx = group[None], idx[None]
    return (k_group == group[:, None]) & (k_idx >= start[:, None]) & (k_idx < stop[:, None])
