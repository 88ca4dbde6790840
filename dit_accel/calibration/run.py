"""`dit_accel.calibrate`: a pipeline runs on a few prompts, and each head is given what it needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dit_accel.arguments import integer, is_number, shown
from dit_accel.errors import UnavailableError
from dit_accel.patterns import StaticPattern
from dit_accel.patterns.calibration import REORDERED, Calibration
from dit_accel.patterns.reordered_blocks import packed_blocks
from dit_accel.pipelines.families import family_of
from dit_accel.runtime.switching import transformers_of
from dit_accel.seeds import check_seed

from .block_choice import BUDGETS, best_orders, kept_blocks
from .candidates import REORDERED_BLOCKS, check_candidates, static_candidates
from .mass_pass import MassPass
from .mixing import mixed
from .passes import Runs

Prompt = str | Mapping[str, Any]


def calibrate(
    pipe: Any,
    prompts: Prompt | Iterable[Prompt],
    *,
    density: float,
    candidates: Sequence[str | StaticPattern] = (REORDERED_BLOCKS,),
    tails: bool = True,
    budget: str = "head",
    block_size: int = 64,
    stretches: int = 10,
    queries: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = False,
    most_bytes: int = 8 << 30,
    **call: Any,
) -> Calibration:
    """What each head of a pipeline's transformers should compute, found on a few prompts (one or two do).

    The pipeline runs densely on each prompt, with every layer, head and step watched, in all guidance
    branches. With `candidates=("reordered",)` this is PARO: of each head the mass of attention of every pair
    of blocks is summed for six orders of the axes; the head takes the order whose largest blocks at this
    density hold the most, and in each stretch of a run its largest blocks. With more candidates the prompts
    run once more, and the error of a head's output is measured under every one of them, with the tail and
    without; the budget then goes to whichever choice saves the most error for each pair it computes, until
    the mean over layers, heads and steps reaches `density`.

    Args:
        pipe: a diffusers pipeline. What is enabled on it is off meanwhile.
        prompts: texts, or mappings of arguments of the pipeline's call in their place.
        density: share of the pairs of blocks of visual tokens that are computed, above 0 and at most 1.
        candidates: `"reordered"`, blocks along an order of the axes; `"static"`, patterns of the toolkit at
            several widths that suit the grid; names of patterns, such as `"Radial"`, for these alone; or
            patterns themselves.
        tails: with more than one candidate, whether each is also tried with the compensated tail.
        budget: of reordered blocks alone: `"head"`: each head has this density; `"global"`: one threshold for
            all heads of a stretch, so that those whose attention is spread out get more.
        block_size: tokens of a block.
        stretches: equal parts of a run with blocks of their own; those of its second half share theirs.
        queries: how many queries of each call are looked at, drawn by `seed`; None: all.
        seed: of the first prompt's noise; those after it count up.
        folder: keeps what was found after each prompt, and goes on from there the next time; None: nothing.
        progress: whether to show a progress bar on stderr.
        most_bytes: memory that the sums of the six orders may take.
        **call: of the pipeline's call: sizes, `num_inference_steps`, guidance, ...

    Returns:
        a calibration for `patterns.Calibrated`.

    Raises:
        ValueError: values outside these forms, layers with other grids than each other, prompts that ran with
            another number of steps, sums beyond `most_bytes`, or a folder begun with other settings.
        TypeError: no supported pipeline.
        UnavailableError: a model whose chunks see no frames to come (SkyReels-V2 with `causal_block_size`),
            or that several processes share.

    Source: of the blocks and orders, Zhao et al., "PAROAttention", 2025, whose calibration was not released:
    there orders are weighed by nearly empty blocks; the choice among patterns is this library's own.
    """
    if not is_number(density) or not 0 < density <= 1:
        raise ValueError(f"`density` must be a number above 0 and at most 1, got {shown(density)}")
    if budget not in BUDGETS:
        raise ValueError(f"`budget` must be 'head' or 'global', got {shown(budget)}")
    block_size, stretches = (
        integer(name, value, 1) for name, value in (("block_size", block_size), ("stretches", stretches))
    )
    queries = None if queries is None else integer("queries", queries, 1)
    every: list[Any] = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
    if not every:
        raise ValueError("`prompts` must have at least one prompt, got none")
    candidates = tuple(candidates) if not isinstance(candidates, (str, StaticPattern)) else (candidates,)
    check_candidates(candidates)
    _check_chunks(pipe, call)
    options = {"block_size": block_size, "stretches": stretches, "queries": queries, "seed": check_seed(seed)}
    runs = Runs(pipe, every, seed, call, None if folder is None else Path(folder), progress, options)
    found = MassPass(options, most_bytes).over(runs)
    about = {
        "prompts": [_told(prompt) for prompt in every],
        "budget": budget,
        "candidates": [str(one) for one in candidates],
        **{name: options[name] for name in ("seed", "queries")},
    }
    static = static_candidates(candidates, found.layout)
    if REORDERED_BLOCKS in candidates and not static:
        return _reordered(found, float(density), budget, about)
    return mixed(runs, found, float(density), static, REORDERED_BLOCKS in candidates, tails, about)


def _check_chunks(pipe: Any, call: Mapping[str, Any]) -> None:
    """Refuses, before a run, a model that hides frames to come from heads, or shares heads."""
    for transformer in transformers_of(pipe).values():
        if getattr(transformer, "_parallel_config", None) is not None:
            raise UnavailableError(
                "a calibration measures all heads, and processes that share a transformer (context or tensor "
                "parallelism) have some each; calibrate in one process: what is found serves several"
            )
        if reason := family_of(transformer).calibration_refusal:
            raise UnavailableError(
                f"{type(transformer).__name__} cannot be calibrated: {reason}; use `ChunkGrowth`, or a "
                "static pattern in all heads"
            )
        chunk = call.get("causal_block_size") or transformer.config.get("num_frame_per_block", 1)
        if chunk > 1:
            raise UnavailableError(
                "a calibration measures heads that see all frames, and this model hides those to come "
                f"(`causal_block_size` {chunk}); calibrate with causal_block_size=1 and tails=False: what is "
                "found is restricted to chunks where it runs"
            )


def _reordered(found: MassPass, density: float, budget: str, about: dict[str, Any]) -> Calibration:
    """PARO: blocks alone, one order for each head."""
    order = best_orders(found.mass, density)[..., 0]  # (layers, heads)
    rows, layers, heads, _, *blocks = found.mass.shape
    index = order[None, :, :, None, None, None].expand(rows, -1, -1, 1, *blocks)
    mass = found.mass.gather(3, index).squeeze(3)
    kept = torch.stack([kept_blocks(row, density, budget) for row in mass])
    return Calibration(
        **found.model,
        density=density,
        patterns=(),
        chosen=torch.full((rows, layers, heads), REORDERED, dtype=torch.int16, device="cpu"),
        tail=torch.zeros(rows, layers, heads, dtype=torch.bool, device="cpu"),
        order=order.to(torch.uint8).expand(rows, -1, -1).contiguous(),
        place=torch.arange(rows * layers * heads, dtype=torch.int32, device="cpu").view(rows, layers, heads),
        blocks=packed_blocks(kept).flatten(0, 2),
        about=about,
    )


def _told(prompt: Prompt) -> str:
    """A prompt's text, or the names of arguments that stand for it."""
    return prompt if isinstance(prompt, str) else ", ".join(sorted(prompt))
