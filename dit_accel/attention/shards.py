"""Context parallelism (Ulysses): the tokens of a call over several processes, and in attention its heads.

Outside attention every process has some of the tokens and all heads; inside, all tokens and some of the
heads. Most joint models split text and visual tokens each by itself, so that what comes together from the
processes are the stretches v0 t0 v1 t1 ...; here each stretch goes where its tokens stand in the call, before
anything is masked, and back after it.

Source: Jacobs et al., "DeepSpeed Ulysses", arXiv 2309.14509.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from dit_accel.masks.layout import TokenLayout

from .head_balance import Balance


@dataclass(frozen=True, eq=False)
class Shards:
    """What one of several processes has of the calls of a transformer.

    Attributes:
        rank, count: which process of how many.
        group: of them; None: the default one.
        heads: of a layer, over all processes.
        layers: names of the layers whose tokens are split.
        uneven: whether tokens may be split into parts that differ by one (`ulysses_anything`).
        together: whether all tokens are split as one stream; if not, visual tokens and text each by itself.
    """

    rank: int
    count: int
    group: Any
    heads: int
    layers: frozenset[str]
    uneven: bool = False
    together: bool = False

    def __str__(self) -> str:
        own = self.own_heads
        return f"process {self.rank} of {self.count} computes heads {own.start} to {own.stop - 1}"

    def sizes(self, tokens: int) -> list[int]:
        """How many of so many tokens, or heads, each process has, as `torch.tensor_split` has it."""
        return [tokens // self.count + (rank < tokens % self.count) for rank in range(self.count)]

    @property
    def own_heads(self) -> range:
        """The heads that this process computes of layers whose heads have as much to do."""
        sizes = self.sizes(self.heads)
        first = sum(sizes[: self.rank])
        return range(first, first + sizes[self.rank])

    def check(self, layout: TokenLayout) -> None:
        """Raise ValueError where tokens cannot be split among the processes."""
        for name, tokens in self._parts(layout).items():
            if tokens % self.count and not self.uneven:
                raise ValueError(
                    f"{tokens} {name}tokens do not divide by {self.count} processes; switch parallelism on "
                    "with `ContextParallelConfig(..., ulysses_anything=True)`, or change their number"
                )
            if 0 < tokens < self.count:
                raise ValueError(
                    f"{tokens} {name}tokens are fewer than the {self.count} processes; use fewer of them"
                )

    def to_heads(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: TokenLayout,
        balance: Balance | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Own tokens of all heads, (B, s, H, D) each, to all tokens of own heads in the order of the call.

        Args:
            q, k, v: of this process.
            layout: of all tokens of the layer.
            balance: which heads each process computes; None: neighbours.

        Returns:
            q, k, v (B, S, h, D).

        Raises:
            RuntimeError: other tokens than this process should have.
        """
        streams, own = self._streams(layout), len(self.own_heads)
        counts = [sum(parts) for parts in zip(*streams, strict=True)]
        if q.shape[1] != counts[self.rank] or k.shape[1] != q.shape[1]:
            raise RuntimeError(
                f"process {self.rank} of {self.count} has {q.shape[1]} queries and {k.shape[1]} keys of "
                f"{layout}, and should have {counts[self.rank]}: its transformer was split by another plan "
                "than `dit_accel.parallel.plan_of(transformer)`"
            )
        x = torch.stack((q, k, v))
        batch, dim = x.shape[1], x.shape[4]
        sizes = self.sizes(self.heads)
        if balance is None:
            groups = x.split(sizes, dim=3)
        else:
            groups = [x.index_select(3, heads) for heads in balance.order.split(sizes)]
        sent = [part.reshape(-1) for part in groups]
        received = exchange(sent, [3 * batch * count * own * dim for count in counts], self.group)
        parts = [part.view(3, batch, -1, own, dim) for part in received]
        by_stream = zip(
            *(part.split(own_, dim=2) for part, own_ in zip(parts, zip(*streams, strict=True), strict=True)),
            strict=True,
        )
        q, k, v = torch.cat([part for stream in by_stream for part in stream], dim=2)
        return q, k, v

    def to_tokens(
        self, out: torch.Tensor, layout: TokenLayout, balance: Balance | None = None
    ) -> torch.Tensor:
        """The inverse: all tokens of own heads (B, S, h, D) to own tokens of all heads (B, s, H, D)."""
        streams = self._streams(layout)
        batch, dim, heads = out.shape[0], out.shape[3], self.sizes(self.heads)
        stretches = iter(out.split([n for stream in streams for n in stream], dim=1))
        by_stream = [[next(stretches) for _ in stream] for stream in streams]
        sent = [torch.cat(parts, dim=1).reshape(-1) for parts in zip(*by_stream, strict=True)]
        count = sum(stream[self.rank] for stream in streams)
        received = exchange(sent, [batch * count * n * dim for n in heads], self.group)
        parts = [part.view(batch, count, n, dim) for part, n in zip(received, heads, strict=True)]
        joined = torch.cat(parts, dim=2)
        return joined if balance is None else joined.index_select(2, balance.inverse)

    def sent_bytes(self, layout: TokenLayout, batch: int, width: int, itemsize: int) -> int:
        """What this process sends to others for one call of a layer: q, k, v, and the output back.

        Args:
            layout: of all tokens of the layer.
            batch: samples.
            width: channels of all heads together.
            itemsize: bytes of a channel.
        """
        own_tokens = sum(stream[self.rank] for stream in self._streams(layout))
        own_width = width * len(self.own_heads) // self.heads
        there = 3 * own_tokens * (width - own_width)
        back = (layout.seq_len - own_tokens) * own_width
        return batch * itemsize * (there + back)

    def _streams(self, layout: TokenLayout) -> list[list[int]]:
        """Of each stream that is split by itself, in the order of the call, the tokens of every process."""
        return [self.sizes(tokens) for tokens in self._parts(layout).values()]

    def _parts(self, layout: TokenLayout) -> dict[str, int]:
        """How many tokens each stream has, in the order of the call, by what they are called."""
        if self.together:
            return {"": layout.seq_len}
        parts = {"visual ": layout.seq_len - layout.text_len, "text ": layout.text_len}
        return dict(reversed(parts.items())) if layout.text_first else parts


def exchange(sent: list[torch.Tensor], received: list[int], group: Any) -> tuple[torch.Tensor, ...]:
    """One flat tensor to each process of a group, and one from each, of these lengths; differentiable."""
    lengths = [len(part) for part in sent]
    return _AllToAll.apply(torch.cat(sent), lengths, received, group).split(received)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, flat, sent, received, group):
        ctx.back = (received, sent, group)
        out = flat.new_empty(sum(received))
        distributed.all_to_all_single(out, flat, received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx, gradient):
        return _AllToAll.apply(gradient.contiguous(), *ctx.back), None, None, None
