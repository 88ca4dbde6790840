"""What the tab Masks shows of a pattern on a grid: pictures, figures, speed-ups, and Python for them."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from dit_accel.masks.block_picture import draw_blocks, draw_neighbourhood
from dit_accel.masks.estimate import MaskEstimate, estimate_mask
from dit_accel.masks.layout import TokenLayout
from dit_accel.patterns.base import StaticPattern
from dit_accel.recipe.recipe import Recipe

from . import inputs
from .exports import Export, recipe_in_python
from .mask_choices import checked_grid, geometries, read, written
from .settings import Caps
from .tab import Studio
from .worker import IMPORTS

if TYPE_CHECKING:
    from PIL.Image import Image

ORDERS = ("raster", "tile", "auto")
BLOCKS = ("128x64", "128x128", "64x64", "64x32", "32x32")
SAMPLED, SAMPLED_OF_LONG, LONG = 256, 24, 20_000  # query blocks; tokens from which fewer are looked at


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is to be drawn: a pattern, by noise what it is at one level."""

    whole: StaticPattern
    pattern: StaticPattern
    noise: float | None  # None where it is the same at all levels
    layout: TokenLayout
    blocks: tuple[int, int]

    @classmethod
    def checked(cls, caps: Caps, name, parameters, frames, rows, columns, text, blocks, noise=1.0) -> Asked:
        """What a visitor gave; ValueError where that is nothing to draw."""
        whole = read(name, parameters, caps)
        level = inputs.number("Noise level", noise, 0, 1) if whole.by_noise else None
        pattern = whole.at_step(0, sigma=level) if whole.by_noise else whole
        layout = TokenLayout(
            checked_grid(frames, rows, columns, caps), text_len=inputs.whole("Text", text, 0, 8192)
        )
        if blocks not in BLOCKS:
            raise ValueError(f"Block must be one of {', '.join(BLOCKS)}.")
        if not isinstance(pattern, StaticPattern):
            raise ValueError(f"{type(pattern).__name__} chooses by content, which is not known here.")
        if pattern.pooled_keys(layout):
            raise ValueError("Pooled keys are not drawn here; leave `downsample` out.")
        return cls(whole, pattern, level, layout, tuple(map(int, blocks.split("x"))))

    @property
    def sampled(self) -> int:
        """Query blocks that block densities are counted on."""
        return SAMPLED_OF_LONG if self.layout.seq_len > LONG else SAMPLED


@lru_cache(maxsize=8)  # for the figures that follow a drawing, and for other visitors
def estimates_of(asked: Asked) -> dict[str, MaskEstimate]:
    """By the name of the order, which all noise levels of a pattern share; one object for equal orders."""
    found: dict[str, MaskEstimate] = {}
    for name in ORDERS:
        order = asked.whole.token_order(asked.layout, asked.blocks, name)
        same = next((one for one in found.values() if torch.equal(one.order, order)), None)
        found[name] = same or estimate_mask(asked.pattern, asked.layout, asked.blocks, order, asked.sampled)
    return found


def drawn(asked: Asked) -> tuple[dict[str, MaskEstimate], list[Image]]:
    """What is known of each order; pictures of a neighbourhood and of the blocks in each order."""
    estimates = estimates_of(asked)
    blocks = {
        one: draw_blocks(asked.pattern, asked.layout, asked.blocks, one.order)
        for one in set(estimates.values())
    }
    near = draw_neighbourhood(asked.pattern, asked.layout)
    return estimates, [near, *(blocks[one] for one in estimates.values())]


def summary_of(asked: Asked, estimates: dict[str, MaskEstimate]) -> dict[str, Any]:
    """The figures, without speed-ups."""
    best = min(one.block_density for one in estimates.values())
    any_one = next(iter(estimates.values()))
    note = ""
    if any_one.sampled < any_one.rows:
        note = f"Shares of blocks are estimated from {any_one.sampled} of {any_one.rows} query blocks."
    here = f"{type(asked.pattern).__name__} {written(asked.pattern)}".strip()
    return {
        "tokens": f"{asked.layout.seq_len:,}",
        "level": "" if asked.noise is None else here,
        "density": any_one.density,
        "density_text": f"{any_one.density:.1%}",
        "rows": [
            {
                "order": name,
                "block_density": one.block_density,
                "text": f"{one.block_density:.1%}",
                "mark": "best" if one.block_density == best else "",
            }
            for name, one in estimates.items()
        ],
        "note": note,
    }


def predicted(studio: Studio, model: Any, *given: Any) -> dict[str, Any]:
    """The figures of what was `given`, as `Asked.checked` takes it, with a model's speed-ups or why none."""
    from dit_accel.planning.model_config import all_published
    from dit_accel.planning.uniform import uniform_speedups

    asked = Asked.checked(studio.settings.caps, *given)
    known = geometries()
    if model not in known:
        raise ValueError("Choose one of the listed geometries.")
    estimates, grid = estimates_of(asked), asked.layout.grid
    answer = summary_of(asked, estimates)
    settings, best = studio.settings, estimates["auto"]
    with studio.worker.unless_busy() as free:  # counting FLOPs hooks every module, those of a run too
        if not free:
            return {**answer, "note": f"{answer['note']} Speed-ups are counted when no run is under way."}
        try:
            with IMPORTS:
                found = uniform_speedups(
                    asked.pattern,
                    all_published()[known[model][0]],
                    grid,
                    best.density,
                    best.block_density,
                    settings.device.type,
                    settings.dtype_name,
                )
        except ValueError as error:  # a grid that this model does not take
            return {**answer, "note": f"{answer['note']} No speed-up: {error}".strip()}
    answer |= {name: f"{found[name].ideal:.2f}×" for name in ("attention", "step")}
    if found["step"].predicted is not None:
        answer["predicted"] = f"{found['step'].predicted:.2f}×"
    return answer


def export_of(asked: Asked) -> Export:
    """Python that draws the same pictures, and the command that plans and draws the whole mask."""
    recipe = Recipe(asked.whole, block_size=asked.blocks)
    level = "" if asked.noise is None else f".at_step(0, sigma={asked.noise})"
    grid, (q, k) = asked.layout.grid, asked.blocks
    python = (
        "import dit_accel\nfrom dit_accel.masks.block_picture import draw_blocks, draw_neighbourhood\n"
        "from dit_accel.masks.estimate import estimate_mask\n\n"
        f"recipe = {recipe_in_python(recipe)}\n"
        f"pattern = recipe.attention{level}\n"
        f"layout = dit_accel.TokenLayout({grid}, text_len={asked.layout.text_len})\n"
        'draw_neighbourhood(pattern, layout).save("neighbourhood.png")\n'
        f"for name in {ORDERS}:\n"
        f"    order = recipe.attention.token_order(layout, ({q}, {k}), name)\n"
        f"    mask = estimate_mask(pattern, layout, ({q}, {k}), order, {asked.sampled})\n"
        "    print(name, mask.density, mask.block_density)\n"
        f'    draw_blocks(pattern, layout, ({q}, {k}), order).save(f"{{name}}.png")\n'
    )
    command = f"cat > draw.py <<'END_OF_PYTHON'\n{python}END_OF_PYTHON\npython draw.py\n"
    return Export(recipe.to_yaml(), python, command)
