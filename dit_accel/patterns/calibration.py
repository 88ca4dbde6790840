"""A calibration: what was chosen for each layer, head and stretch of a run of one model, and its file."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dit_accel import tensor_files
from dit_accel.arguments import is_number, shown
from dit_accel.masks.layout import TokenLayout
from dit_accel.masks.orders import AXIS_ORDERS

from .base import Grid, StaticPattern
from .clear import Clear
from .dense import Dense
from .head_choice import HeadChoice
from .inward_window import InwardWindow
from .local_global import LocalGlobal
from .neighborhood import Neighborhood
from .plain import from_plain, to_plain
from .radial import Radial
from .reordered_blocks import ReorderedBlocks
from .sliding_tile import SlidingTile
from .sparse_videogen import SpatialHead, TemporalHead

FORMAT = "dit-accel calibration 1"
REORDERED = -1  # in `chosen`: blocks of its own
_MOST = 100_000  # of layers, heads, steps and rows each
_KINDS = (
    *(Clear, Dense, InwardWindow, LocalGlobal, Neighborhood, Radial, SlidingTile),
    *(SpatialHead, TemporalHead),
)
# what heads may be given beside blocks of their own: patterns that stay the same from step to step
STATIC = {cls.__name__: cls for cls in _KINDS}
_TENSORS = {"chosen", "tail", "order", "place", "blocks"}


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """What each head of a model computes, row by row; a run takes one row of it at each of its steps.

    Made by `dit_accel.calibrate`, used by `patterns.Calibrated`. Equal if their contents are.

    Attributes:
        family, layers, heads, head_dim: of the model: its layers' names, and heads of each.
        grid: of the visual tokens, (F, H, W).
        steps: of the runs that it was made from.
        stretches: a run is cut into so many equal ones; the row of each.
        density: what was aimed at.
        block_size: tokens of a block of reordered heads.
        patterns: static patterns that heads may have.
        chosen: int16 (rows, layers, heads), an index into `patterns`, or `REORDERED`.
        tail: bool of that shape, whether what is left out contributes by its means.
        order: uint8 of that shape, which of `masks.orders.AXIS_ORDERS` reordered heads have.
        place: int32 of that shape, which row of `blocks` is theirs, -1 for others.
        blocks: uint8 (n, bytes), bits as of `ReorderedBlocks.blocks`.
        about: plain data on how it was made.

    Raises:
        ValueError: values that do not fit each other.
    """

    family: str
    layers: tuple[str, ...]
    heads: int
    head_dim: int
    grid: Grid
    steps: int
    stretches: tuple[int, ...]
    density: float
    block_size: int
    patterns: tuple[StaticPattern, ...]
    chosen: torch.Tensor
    tail: torch.Tensor
    order: torch.Tensor
    place: torch.Tensor
    blocks: torch.Tensor
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        _check(self)

    # -- what it says ----------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        return self.chosen.shape[0]

    @property
    def row_shares(self) -> list[float]:
        """The share of the steps at which a run takes each row."""
        counts = Counter(self.row(step) for step in range(self.steps))
        return [counts[row] / self.steps for row in range(self.rows)]

    def row(self, step: int, total: int | None = None, rescale: bool = False) -> int:
        """The row of a step of a run of `total` steps, by default of as many as it was made from.

        Raises:
            ValueError: another number of steps, unless `rescale`, or a step beyond them.
        """
        if self.rows == 1:
            return 0
        if total not in (None, self.steps) and not rescale:
            raise ValueError(
                f"this calibration was made for runs of {self.steps} steps, and this one has {total}; "
                "calibrate at this number of steps, or use `rescale=True`"
            )
        total = self.steps if total is None else total
        if not 0 <= step < total:
            raise ValueError(f"step {step} is beyond the {total} steps of the run")
        return self.stretches[step * len(self.stretches) // total]

    def layer_index(self, name: str) -> int:
        """Raises ValueError for a layer that it does not have."""
        if name not in self.layers:
            raise ValueError(
                f"this calibration has no layer {shown(name)}; it has {self.layers[0]} to {self.layers[-1]}"
            )
        return self.layers.index(name)

    def choices(self, layer: int, head: int, rescale: bool = False) -> tuple[HeadChoice, ...]:
        """What a head computes in each row."""
        key = (layer, head, rescale)
        if key not in self._made:
            self._made[key] = tuple(self._choice(row, layer, head, rescale) for row in range(self.rows))
        return self._made[key]

    @cached_property
    def _made(self) -> dict[tuple, Any]:
        return {}

    def _choice(self, row: int, layer: int, head: int, rescale: bool) -> HeadChoice:
        at = (row, layer, head)
        grid, tail = None if rescale else self.grid, bool(self.tail[at])
        if int(self.chosen[at]) != REORDERED:
            return HeadChoice(self.patterns[int(self.chosen[at])], tail, grid)
        key = (int(self.order[at]), int(self.place[at]))
        if key not in self._made:
            bits = self.blocks[key[1]].numpy().tobytes()
            self._made[key] = ReorderedBlocks(self.grid, list(AXIS_ORDERS)[key[0]], self.block_size, bits)
        return HeadChoice(self._made[key], tail, grid)

    def check_model(self, family: str, layers: Sequence[str], heads: int, head_dim: int) -> None:
        """Raises ValueError if it was made for another model than this one, saying in what they differ."""
        if self.family != family:
            raise ValueError(
                f"this calibration was made for the family {self.family!r}, and this is a model of {family!r}"
            )
        own, other = (self.heads, self.head_dim), (heads, head_dim)
        if own != other or list(self.layers) != list(layers):
            told = "{} layers of {} heads of {}".format
            raise ValueError(
                f"this calibration was made for another model: {told(len(self.layers), *own)}, and this has "
                f"{told(len(layers), *other)}; calibrate this one"
            )

    def counts(self) -> dict[str, int]:
        """How many heads, over all rows, have each kind of choice: "HWF", "Radial", "Radial with a tail"."""
        names = [*(type(p).__name__ for p in self.patterns)]
        found: Counter[str] = Counter()
        for chosen, order, tail in zip(
            *(x.flatten().tolist() for x in (self.chosen, self.order, self.tail)), strict=True
        ):
            kind = list(AXIS_ORDERS)[order] if chosen == REORDERED else names[chosen]
            found[kind + (" with a tail" if tail else "")] += 1
        return dict(found.most_common())

    # -- comparison and files --------------------------------------------------------------------------------

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in sorted(_TENSORS)}

    @property
    def fields(self) -> dict[str, Any]:
        """All else, as plain data."""
        names = ("family", "layers", "heads", "head_dim", "grid", "steps", "stretches", "density")
        plain = {name: getattr(self, name) for name in (*names, "block_size", "about")}
        return {**plain, "patterns": [to_plain(pattern) for pattern in self.patterns]}

    @cached_property
    def digest(self) -> str:
        """Of its contents, 16 hexadecimal digits."""
        described = json.dumps({**self.fields, "about": None}, sort_keys=True)
        return hashlib.sha256(tensor_files.checksum(self.tensors, described).encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Calibration) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.counts().items())
        return (
            f"Calibration({self.family}, {len(self.layers)} layers of {self.heads} heads, grid {self.grid}, "
            f"{self.steps} steps, density {self.density:g}: {kinds})"
        )

    def file(self) -> str:
        """The path of the file that holds it.

        Raises:
            ValueError: it was neither saved nor loaded.
        """
        path = self._made.get("file")
        if path is None:
            raise ValueError("this calibration has no file that a recipe could name; call its `save` first")
        return str(path.absolute())

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, whole or not at all."""
        tensor_files.write(Path(path), FORMAT, self.tensors, self.fields)
        self._made["file"] = Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file written by `save`; nothing in it is believed before it is checked, and none of it runs.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that is no calibration, is damaged, or of an earlier format.
        """
        path = Path(path)
        tensors, data = tensor_files.read(path, FORMAT, "calibration", _TENSORS)
        try:
            data = dict(data)
            for name in ("layers", "grid", "stretches"):
                data[name] = tuple(data[name])
            data["patterns"] = tuple(from_plain(one, STATIC) for one in data["patterns"])
            found = cls(**data, **tensors)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged: {error!s:.500}") from None
        found._made["file"] = path
        return found


def _check(own: Calibration) -> None:
    """Raises ValueError unless all of it fits together."""
    if not isinstance(own.family, str) or not all(isinstance(name, str) for name in own.layers):
        raise ValueError("`family` and the names of `layers` must be text")
    if not own.layers or len(own.layers) > _MOST or len(set(own.layers)) < len(own.layers):
        raise ValueError(f"`layers` must be different names, at least one, got {shown(own.layers)}")
    for name in ("heads", "head_dim", "steps", "block_size"):
        value = getattr(own, name)
        if type(value) is not int or not 0 < value <= _MOST:
            raise ValueError(f"`{name}` must be an integer from 1 to {_MOST}, got {shown(value)}")
    if not is_number(own.density) or not 0 < own.density <= 1:
        raise ValueError(f"`density` must be a number above 0 and at most 1, got {shown(own.density)}")
    if not isinstance(own.about, dict):
        raise ValueError(f"`about` must be a mapping, got {shown(own.about)}")
    tokens = TokenLayout(own.grid).visual_len
    if not all(isinstance(pattern, StaticPattern) for pattern in own.patterns):
        raise ValueError(f"`patterns` must be static patterns, got {shown(own.patterns)}")
    shape, blocks = own.chosen.shape, -(-tokens // own.block_size)
    if len(shape) != 3 or not 0 < shape[0] <= _MOST or shape[1:] != (len(own.layers), own.heads):
        raise ValueError(
            f"`chosen` must have shape (rows, {len(own.layers)}, {own.heads}), got {tuple(shape)}"
        )
    forms = {
        "chosen": (torch.int16, shape, REORDERED, len(own.patterns) - 1),
        "tail": (torch.bool, shape, 0, 1),
        "order": (torch.uint8, shape, 0, len(AXIS_ORDERS) - 1),
        "place": (torch.int32, shape, -1, own.blocks.shape[0] - 1),
        "blocks": (torch.uint8, (own.blocks.shape[0], -(-(blocks**2) // 8)), 0, 255),
    }
    for name, (dtype, expected, least, most) in forms.items():
        x = getattr(own, name)
        if x.dtype != dtype or tuple(x.shape) != tuple(expected) or x.device.type != "cpu":
            raise ValueError(f"`{name}` must be {dtype} {tuple(expected)}, got {x.dtype} {tuple(x.shape)}")
        if x.numel() and not least <= int(x.min()) <= int(x.max()) <= most:
            raise ValueError(f"`{name}` must be in {least} .. {most}, got {int(x.min())} .. {int(x.max())}")
    if not torch.equal(own.place >= 0, own.chosen == REORDERED):
        raise ValueError("`place` must name blocks of those heads that are reordered, and of no others")
    diagonal = torch.arange(blocks, device="cpu") * (blocks + 1)
    if not (own.blocks[:, diagonal // 8] >> (diagonal % 8).to(torch.uint8) & 1).all():
        raise ValueError("`blocks` must keep every block's attention to itself")
    wrong = any(type(row) is not int or not 0 <= row < own.rows for row in own.stretches)
    if not own.stretches or len(own.stretches) > _MOST or wrong:
        raise ValueError(f"`stretches` must be rows in 0 .. {own.rows - 1}, got {shown(own.stretches)}")
