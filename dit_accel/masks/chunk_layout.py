"""Token geometry of a call with a KV cache: a chunk of frames, and the earlier ones, some of them coarse."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from .layout import TokenLayout
from .pair_rules import Factor, FactorRule, Pair, Rule


@dataclass(frozen=True)
class ChunkLayout(TokenLayout):
    """The geometry of one call of a model that makes videos chunk by chunk: queries and keys differ.

    Keys are the tokens of all frames so far, frame by frame. Those of the first `coarse` chunks stand for
    `group` tokens of the grid each, later ones for themselves; rows and columns that fill no group have no
    token. Queries are all of them, or the last chunk's. A token attends to chunks up to its own, and a
    pattern holds between two tokens if it holds between any that they stand for, on the grid of the whole
    video.

    Args:
        grid: of the whole video, frames to come included.
        chunks: frames of each of its chunks.
        present: how many of them there are so far.
        coarse: how many of these, from the first, have coarse tokens.
        group: rows and columns of the grid that a coarse token stands for.
        last_alone: whether queries are the tokens of the last chunk that there is.
        zeros: keys of zeros at the end, to which all queries attend.
        padding: tokens that calls have behind the queries and behind the keys, zeros included.

    Raises:
        ValueError: chunks that are not the frames of the grid, or more of them than there are.
    """

    chunks: tuple[int, ...] = ()
    present: int = 0
    coarse: int = 0
    group: tuple[int, int] = (2, 2)
    last_alone: bool = False
    zeros: int = 0
    padding: int = 0

    def __post_init__(self):
        for name in ("chunks", "group"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if min(self.chunks, default=0) < 1 or sum(self.chunks) != self.grid[0]:
            raise ValueError(f"`chunks` must be the {self.grid[0]} frames of the grid, got {self.chunks}")
        most = self.present - self.last_alone
        if not 1 <= self.present <= len(self.chunks) or not 0 <= self.coarse <= most:
            raise ValueError(
                f"`present` must be from 1 to {len(self.chunks)} and `coarse` from 0 to {most}, got "
                f"{self.present} and {self.coarse}"
            )
        if self.coarse and not all(self.frame_tokens):
            raise ValueError(f"`group` {self.group} must fit into the rows and columns of grid {self.grid}")
        super().__post_init__()

    @property
    def coarse_frames(self) -> int:
        return sum(self.chunks[: self.coarse])

    @property
    def frame_tokens(self) -> list[int]:
        """Tokens of each frame that there is."""
        _, height, width = self.grid
        few = (height // self.group[0]) * (width // self.group[1])
        fine = sum(self.chunks[self.coarse : self.present])
        return [few] * self.coarse_frames + [height * width] * fine

    @property
    def chunk_of_tokens(self) -> torch.Tensor:
        """The chunk that each token is of, int64 (tokens,), CPU."""
        lengths = torch.tensor(self.chunks[: self.present], dtype=torch.int64, device="cpu")
        frames = torch.tensor(self.frame_tokens, dtype=torch.int64, device="cpu")
        chunk = torch.arange(self.present, device="cpu").repeat_interleave(lengths)
        return chunk.repeat_interleave(frames)

    @property
    def seq_len(self) -> int:
        """Number of queries."""
        if self.last_alone:
            return self.chunks[self.present - 1] * self.grid[1] * self.grid[2]
        return self.tokens

    @property
    def tokens(self) -> int:
        """Of all frames that there are."""
        return sum(self.frame_tokens)

    @property
    def kv_len(self) -> int:
        return self.tokens + self.zeros

    @property
    def call_lengths(self) -> tuple[int, int]:
        return self.seq_len + self.padding, self.tokens + self.padding

    @cached_property
    @torch.inference_mode(False)
    def members(self) -> torch.Tensor:
        """The tokens of the grid that each token stands for, row-major: int64 (tokens, 1 or more), CPU."""
        frames, (_, height, width), (rows, columns) = self.coarse_frames, self.grid, self.group
        grid = torch.arange(self.visual_len, device="cpu").view(self.grid)
        fine = grid[frames : sum(self.chunks[: self.present])].reshape(-1, 1)
        if not frames:
            return fine
        high, wide = height // rows, width // columns
        groups = grid[:frames, : high * rows, : wide * columns].reshape(frames, high, rows, wide, columns)
        groups = groups.transpose(2, 3).reshape(-1, rows * columns)
        return torch.cat([groups, fine.expand(-1, groups.shape[1])])

    def in_order(self, order: torch.Tensor) -> torch.Tensor:
        """All tokens in the order of the grid's, int64 (tokens,): each by the first that it stands for.

        Args:
            order: of the tokens of the grid, int64 (V,).
        """
        return torch.argsort(torch.argsort(order.cpu())[self.members[:, 0]])


class ChunkRule(Rule):
    """What a rule on the grid of a video leaves of a `ChunkLayout`: tokens count as they stand there.

    Args:
        rule: of the tokens of the grid.
        layout: which tokens there are, and which chunk they are of.
    """

    def __init__(self, rule: Rule, layout: ChunkLayout):
        self._rule, self._members = rule, layout.members
        seen = torch.ones(layout.present, layout.present, dtype=torch.bool, device="cpu").tril()
        self._causal = FactorRule([Factor(layout.chunk_of_tokens, seen)])

    def mask(self) -> torch.Tensor:
        one, other = self._members[:, None, :, None], self._members[:, None]
        return self._rule.mask()[one, other].flatten(2).any(2) & self._causal.mask()

    def side(self, tokens: torch.Tensor):
        """Those of the members, one after the other, and that of the chunks."""
        members = self._members[tokens]
        themselves = bool((members == members[..., :1]).all())
        sides = [self._rule.side(own) for own in (members[..., :1] if themselves else members).unbind(-1)]
        return sides, self._causal.side(tokens)

    def classify(self, q, k, rows: slice) -> Pair:
        maybe, sure = self._causal.classify(q[1], k[1], rows)
        answers = [self._rule.classify(one, other, rows) for one in q[0] for other in k[0]]
        return maybe & _any(one for one, _ in answers), sure & _any(one for _, one in answers)

    def tiles(self, q, k, r: torch.Tensor, c: torch.Tensor) -> Pair:
        def bits(rule: Rule, one, other) -> torch.Tensor:
            tiles, which = rule.tiles(one, other, r, c)
            return tiles[which]

        found = _any(bits(self._rule, one, other) for one in q[0] for other in k[0])
        return found & bits(self._causal, q[1], k[1]), torch.arange(r.numel(), device="cpu")


def _any(parts) -> torch.Tensor:
    """What any of some tensors of booleans or bits has."""
    first, *others = parts
    for other in others:
        first = first | other
    return first
