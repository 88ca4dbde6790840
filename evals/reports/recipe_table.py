"""Which recipe for which model: `python -m dit_accel.evals.reports.recipe_table`.

Writes what `dit-accel plan --device cuda` says of every preset at the usual sizes of its family into
docs/recipes.md, a choice of them and the families into the README; with families as arguments, only theirs
is planned anew. No GPU is asked: the speed-ups are what plans call ideal,
every block at the cost of one of dense attention's and the rest of a step at the same FLOP/s, so that the
tables follow from the code alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dit_accel.files import read_text
from dit_accel.planning.model_config import ModelConfig, all_published
from dit_accel.planning.plan import Plan, plan
from dit_accel.recipe.recipe import presets, resolve

from . import marked
from .family_table import family_table

README, PAGE = Path("README.md"), Path("docs/recipes.md")
COMMAND = "python -m dit_accel.evals.reports.recipe_table"


@dataclass(frozen=True)
class Model:
    """A published model at one size: its name among `planning`'s, what readers call it, pixels, frames.

    `steps` are those of a run where they are not the model's own.
    """

    name: str
    title: str
    size: tuple[int, int]
    frames: int | None = None
    steps: int | None = None

    @property
    def where(self) -> str:
        return f"{self.size[0]}x{self.size[1]}" + (f", {self.frames} frames" if self.frames else "")

    @property
    def config(self) -> ModelConfig:
        return all_published()[self.name]


FLUX = [Model("flux.1-dev", "FLUX.1-dev", (side, side)) for side in (1024, 2048, 4096)]
SD3 = [
    Model("sd3.5-large", "SD3.5 large", (1024, 1024)),
    Model("sd3.5-medium", "SD3.5 medium", (1440, 1440)),
]
WAN = [
    Model("wan2.1-14b", "Wan 2.1 14B", (832, 480), 81),
    Model("wan2.1-14b", "Wan 2.1 14B", (1280, 720), 81),
]
SCHNELL = [replace(model, name="flux.1-schnell", title="FLUX.1-schnell") for model in FLUX[:2]]
DISTILLED = [replace(WAN[0], title="Wan 2.1 14B, distilled", steps=4)]
WAN22 = [Model("wan2.2-14b", "Wan 2.2 A14B", (1280, 720), 81)]
BY_PREFIX = {"wan22-": WAN22, "wan-distilled-": DISTILLED, "flux-schnell-": SCHNELL}
HUNYUAN = [Model("hunyuan-video", "HunyuanVideo", (1280, 720), 129)]
HUNYUAN15 = [Model("hunyuan-video-1.5", "HunyuanVideo 1.5", (1280, 720), 121)]
SKYREELS = [Model("skyreels-v2-14b-540p", "SkyReels-V2 14B", (960, 544), 97)]
FLUX2 = [Model("flux.2-dev", "FLUX.2-dev", (side, side)) for side in (1024, 2048, 4096)]
Z_IMAGE = [Model("z-image", "Z-Image", (side, side)) for side in (1024, 2048)]
HUNYUAN_IMAGE = [Model("hunyuan-image-2.1", "HunyuanImage 2.1", (side, side)) for side in (2048, 4096)]
CHROMA = [Model("chroma1-hd", "Chroma1-HD", (side, side)) for side in (1024, 2048)]
QWEN = [Model("qwen-image", "Qwen-Image", (side, side)) for side in (1328, 2656)]
LTX = [
    Model("ltx-video-2b", "LTX-Video 2B", (1216, 704), 257),
    Model("ltx-video-13b", "LTX-Video 13B", (1216, 704), 257),
]
LTX2 = [Model("ltx-2-19b", "LTX-2 19B", (1536, 1024), 241)]
COGVIDEOX = [
    Model("cogvideox-5b", "CogVideoX 5B", (720, 480), 49),
    Model("cogvideox1.5-5b", "CogVideoX 1.5 5B", (1360, 768), 81),
]
MOCHI = [Model("mochi-1", "Mochi 1", (848, 480), 163)]
KANDINSKY = [
    Model("kandinsky-5-lite", "Kandinsky 5 lite", (768, 512), 121),
    Model("kandinsky-5-pro", "Kandinsky 5 pro", (1280, 768), 121),
]
ANIMATE = [Model("wan2.2-animate-14b", "Wan 2.2 Animate 14B", (1280, 720), 77)]
CHRONO = [Model("chrono-edit-14b", "ChronoEdit 14B", (1280, 720), 29)]
MINIMAX = [Model("minimax-h3", "MiniMax H3", (1344, 768), 124)]
HELIOS = [Model("helios-14b", "Helios 14B", (640, 384), 33)]
FAR = [Model("anyflow-far-14b", "AnyFlow-FAR 14B, last chunk", (832, 480), 81)]
BY_FAMILY = {
    "flux": FLUX, "sd3": SD3, "wan": WAN, "hunyuan-video": HUNYUAN, "hunyuan-video-1.5": HUNYUAN15,
    "skyreels-v2": SKYREELS, "ltx-video": LTX, "ltx-2": LTX2, "cogvideox": COGVIDEOX, "mochi": MOCHI,
    "kandinsky-5": KANDINSKY, "wan-animate": ANIMATE, "chrono-edit": CHRONO, "helios": HELIOS,
    "z-image": Z_IMAGE, "hunyuan-image": HUNYUAN_IMAGE, "qwen-image": QWEN, "flux2": FLUX2,
    "chroma": CHROMA, "minimax-h3": MINIMAX, "anyflow-far": FAR,
}  # fmt: skip
FRONT = [  # what the README shows: recipe, model, and what is known of the quality; none was evaluated here
    *(
        ("flux-clear-r16", m, "made for distilled weights, which are not included: pictures change")
        for m in FLUX
    ),
    *(("sd3-neighborhood", m, "window, stride and dense steps are ours, untried on this model") for m in SD3),
    *(("wan-radial", m, "as published, training-free, there at 69 frames of 768p") for m in WAN),
    ("wan22-radial", WAN22[0], "as published, training-free, there at 77 frames"),
    ("hunyuan-video-radial", HUNYUAN[0], "as published, training-free, there at 117 frames of 768p"),
    ("hunyuan-video-1.5-radial", HUNYUAN15[0], "HunyuanVideo's settings, not published for 1.5"),
    ("flux2-neighborhood", FLUX2[2], "as published for FLUX.1, untried on this model"),
    ("ltx-video-radial", LTX[0], "Wan's settings, not published for LTX-Video"),
    ("cogvideox-radial", COGVIDEOX[1], "HunyuanVideo's settings, not published for CogVideoX"),
    ("mochi-radial", MOCHI[0], "HunyuanVideo's settings, not published for Mochi"),
    ("kandinsky-5-radial", KANDINSKY[0], "Wan's settings, not published for Kandinsky 5"),
    ("qwen-image-neighborhood", QWEN[1], "window, stride and dense steps are ours, untried on this model"),
    ("z-image-neighborhood", Z_IMAGE[1], "window, stride and dense steps are ours, untried on this model"),
    (
        "hunyuan-image-neighborhood",
        HUNYUAN_IMAGE[1],
        "window, stride and dense steps are ours, untried on this model",
    ),
    ("minimax-h3-radial", MINIMAX[0], "Wan 2.1's settings, not published for this model"),
    ("chroma-neighborhood", CHROMA[1], "window, stride and dense steps are ours, untried on this model"),
]
EXTRA = {  # models beside those of the presets, of which shares are told
    "wan": WAN22,
    "flux2": [
        Model("flux.2-dev-edit", "FLUX.2-dev, one reference image", (1024, 1024)),
        Model("flux.2-klein-9b", "FLUX.2-klein-9B", (1024, 1024)),
    ],
    "qwen-image": [Model("qwen-image-edit", "Qwen-Image-Edit, one image given", (1024, 1024))],
}
FRONT_HEAD = (
    "| model | size | attention | recipe | pairs computed | a step | a run | what is known of quality |",
    "|---|---|---:|---|---:|---:|---:|---|",
)
PAGE_HEAD = (
    "| recipe | model | size | tokens | pairs computed | blocks computed | dense steps | a step | a run |",
    "|---|---|---|---:|---:|---:|---:|---:|---:|",
)
SHARES_HEAD = (
    "| model | size | tokens | attention's share of the FLOPs | no pattern gains more than |",
    "|---|---|---:|---:|---:|",
)


def cases() -> list[tuple[str, Model]]:
    """Every preset that is not for a bundled model, at each of its family's sizes."""
    found = []
    for name in presets():
        if not name.startswith("tiny-"):
            special = (models for prefix, models in BY_PREFIX.items() if name.startswith(prefix))
            models = next(special, BY_FAMILY[resolve(name).family])
            found += [(name, model) for model in models]
    return found


def planned(recipe: str, model: Model) -> Plan:
    """What is planned for a GPU, in bfloat16.

    Raises:
        ValueError: a pattern that does not fit the size.
    """
    size = {"size": model.size, "frames": model.frames, "steps": model.steps}
    return plan(recipe, model=model.config, **size, device="cuda", dtype=torch.bfloat16)


# -- rows ----------------------------------------------------------------------------------------------------


def front_table(page_rows: list[str], shares: list[str]) -> str:
    """The README's table, from rows of the page's tables."""
    of = {tuple(row[:3]): row for row in map(_cells, page_rows)}
    share_of = {tuple(row[:2]): row[3] for row in map(_cells, shares)}
    rows = []
    for recipe, model, cost in FRONT:
        _, _, _, _, pairs, _, _, step, run = of[f"`{recipe}`", model.title, model.where]
        share = share_of[model.title, model.where]
        rows.append(_row(model.title, model.where, share, f"`{recipe}`", pairs, step, run, cost))
    return "\n".join([*FRONT_HEAD, *rows])


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def page_row(recipe: str, model: Model) -> str:
    """A row of the page's table; of a size that the pattern refuses, the reason."""
    try:
        p = planned(recipe, model)
    except ValueError as error:
        return _row(f"`{recipe}`", model.title, model.where, f"refused: {error}", *[""] * 5)
    cells = [f"`{recipe}`", model.title, model.where, f"{p.tokens:,}"]
    cells += [f"{p.density:.1%}", f"{p.block_density:.1%}", f"{p.dense_steps} of {p.steps}"]
    return _row(*cells, f"{p.step.ideal:.2f}x", f"{p.run.ideal:.2f}x")


def shares_row(model: Model) -> str:
    """How much of a dense step attention is, and what follows from that."""
    config = model.config
    transformer = config.transformer()
    grid = config.grid(transformer, (model.frames or 1, *reversed(model.size)))
    flops = config.flops(transformer, grid)
    share = flops.attention / flops.total
    tokens = config.layout(grid).seq_len
    return _row(model.title, model.where, f"{tokens:,}", f"{share:.0%}", f"{1 / (1 - share):.2f}x")


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def table(name: str) -> list[str]:
    """The rows of one table of the page, without its head."""
    return marked.region(read_text(PAGE), name).splitlines()[2:]


def families(shares: Sequence[str]) -> str:
    """The README's table of families, from the page's rows of shares."""
    titles = {family: [model.title for model in of_family(family)] for family in BY_FAMILY}
    return family_table(shares, titles, [recipe for recipe, *_ in FRONT])


def of_family(family: str) -> list[Model]:
    """Its models in the table of shares."""
    return [*BY_FAMILY[family], *EXTRA.get(family, [])]


def main(only: Sequence[str]) -> None:
    """Writes the tables into the README and the page, planning anew what is of some families, or all."""
    known = {tuple(_cells(row)[:3]): row for row in table("recipes")}
    rows = []
    for name, model in cases():
        row = known.get((f"`{name}`", model.title, model.where))
        if row is None or not only or resolve(name).family in only:
            row = page_row(name, model)
            print(row, file=sys.stderr, flush=True)
        rows.append(row)
    counted = {tuple(_cells(row)[:2]): row for row in table("shares")}
    shares = []
    for family in BY_FAMILY:
        for model in of_family(family):
            row = counted.get((model.title, model.where))
            shares.append(shares_row(model) if row is None or not only or family in only else row)
    page = {"recipes": "\n".join([*PAGE_HEAD, *rows]), "shares": "\n".join([*SHARES_HEAD, *shares])}
    marked.write(PAGE, page)
    marked.write(README, {"recipes": front_table(rows, shares), "families": families(shares)})


if __name__ == "__main__":
    main(sys.argv[1:])
