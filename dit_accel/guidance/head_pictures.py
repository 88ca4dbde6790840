"""What a head search found, in pictures: a heat map of layers x heads, and a sheet of what each head does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dit_accel import media
from dit_accel.files import atomic
from dit_accel.plots import check_plot

from .hunter import Hunt
from .perturbation import Head

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAP, SHEET = "heat-map.png", "sheet.png"  # what `dit-accel hunt` calls them
LABEL, HEADER = 96, 24  # pixels of the sheet's first column and first row
CHOSEN = (214, 39, 40)  # the colour of frames around chosen heads


def heat_map(hunt: Hunt, path: str | Path) -> Figure:
    """One panel per round: how far each head moved the objective's mean from where the round began.

    Heads chosen in a round are framed; those chosen before carry the number of their round.

    Args:
        hunt: of at least one round.
        path: of the PNG.

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    check_plot(Path(path))
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    layers, heads = len(hunt.layers), hunt.heads_per_layer
    effects = _effects(hunt)
    limit = np.nanmax(np.abs(effects), initial=1e-12)
    size = (1.6 + len(effects) * max(1.6, 0.22 * heads), max(2.4, 1.2 + 0.22 * layers))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(effects), sharey=True, squeeze=False)[0]
    for number, (panel, effect, one) in enumerate(zip(panels, effects, hunt.rounds, strict=True), 1):
        image = panel.imshow(effect, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
        panel.set_title(f"round {number}: {one.score:.4g}", fontsize=9)
        panel.set_xlabel("head")
        panel.set_xticks(range(0, heads, max(1, heads // 6)))
        for before, earlier in enumerate(hunt.rounds[: number - 1], 1):
            for layer, head in earlier.chosen:
                panel.text(head, layer, str(before), ha="center", va="center", fontsize=7, color="0.4")
        for layer, head in one.chosen:
            panel.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, lw=1.5, clip_on=False))
    panels[0].set_yticks(range(layers), hunt.layers, fontsize=7)
    figure.colorbar(image, ax=panels, label=f"change of {hunt.objective}")
    figure.suptitle(f"{hunt.objective} without guidance: {hunt.without:.4g}", fontsize=10)
    with atomic(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    return figure


def _effects(hunt: Hunt) -> np.ndarray:
    """(rounds, layers, heads): mean with a head added minus mean before the round, nan where not measured."""
    effects = np.full((len(hunt.rounds), len(hunt.layers), hunt.heads_per_layer), np.nan)
    before = hunt.without
    for effect, one in zip(effects, hunt.rounds, strict=True):
        for head, row in one.means.items():
            effect[head] = row[hunt.objective] - before
        before = one.score
    return effects


def effects_sheet(hunt: Hunt, image: Callable[[tuple[Head, ...]], np.ndarray | None]) -> np.ndarray:
    """A row per layer: one sample with each of its heads perturbed alone, without guidance in front.

    Chosen heads are framed; what was not searched is left white.

    Args:
        hunt: of at least one round.
        image: the sample by perturbed heads, uint8 (H, W, 3) or (T, H, W, 3), or None.

    Returns:
        uint8 (height, width, 3).
    """
    from PIL import Image, ImageDraw, ImageFont

    plain = image(())
    rows = []
    for layer in range(len(hunt.layers)):
        tiles = [image(((layer, head),)) for head in range(hunt.heads_per_layer)]
        tiles = [np.full_like(plain, 255) if tile is None else tile for tile in tiles]
        rows.append(media.contact_sheet(np.stack([plain, *tiles])))
    tiles = np.concatenate(rows)
    height, width = len(rows[0]), tiles.shape[1] // (1 + hunt.heads_per_layer)
    canvas = Image.new("RGB", (LABEL + tiles.shape[1], HEADER + len(tiles)), media.BACKGROUND)
    canvas.paste(Image.fromarray(tiles), (LABEL, HEADER))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for column in range(1 + hunt.heads_per_layer):
        text = f"head {column - 1}" if column else "no guidance"
        draw.text((LABEL + column * width + 4, 5), text, fill=(20, 20, 20), font=font)
    for layer, name in enumerate(hunt.layers):
        draw.text((4, HEADER + layer * height + height // 2), name, fill=(20, 20, 20), font=font)
    for layer, head in hunt.best:
        left, top = LABEL + (1 + head) * width, HEADER + layer * height
        draw.rectangle((left, top, left + width - 1, top + height - 1), outline=CHOSEN, width=3)
    return np.asarray(canvas)
