"""What a recipe saves of a model's step in every family: `python -m dit_accel.evals.benchmarks.family_steps`.

Each model is its real transformer of published width, head counts and text, cut to one block of each kind,
with random weights on the CPU, in bfloat16 where it multiplies that, at a size of some ten thousand tokens.
One call of the transformer, untouched against accelerated, A B A B, medians, in processor time for each
thread, which other work on the machine hardly changes. Models measured before stay in `family_steps_cpu.csv`
under `evals/results`, until they are measured again; the table is `family_steps_cpu.md`.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_accel.environment import environment
from dit_accel.planning.model_config import ModelConfig, Size, published
from dit_accel.recipe.recipe import Recipe, resolve
from dit_accel.runtime.switching import accelerated
from dit_accel.training_loop import multiplies_bf16

from .attention import interleaved
from .table import RESULTS, append, markdown, row

HEADINGS = ("model", "heads x dim", "frames x height x width", "tokens", "recipe", "dtype", "block density",
            "untouched (s)", "accelerated (s)", "speed-up")  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)
METRICS = ("heads", "head_dim", "tokens", "block_density", "untouched_s", "accelerated_s")


@dataclass(frozen=True)
class Case:
    """A published model of a family at a size in pixels, and a recipe."""

    family: str
    variant: str
    size: Size
    recipe: str

    def shape(self, dtype: torch.dtype) -> str:
        """The row's name in the CSV."""
        size, name = "x".join(map(str, self.size)), str(dtype).removeprefix("torch.")
        return f"{self.family} {self.variant} {size} {self.recipe} {name}"


CASES = (
    Case("flux", "flux.1-dev", (1, 1536, 1536), "flux-clear-r16"),
    Case("chroma", "chroma1-hd", (1, 1536, 1536), "chroma-clear-r16"),
    Case("flux2", "flux.2-klein-4b", (1, 1536, 1536), "flux2-clear-r16"),
    Case("sd3", "sd3.5-medium", (1, 1536, 1536), "sd3-clear-r16"),
    Case("qwen-image", "qwen-image", (1, 1536, 1536), "qwen-image-clear-r16"),
    Case("z-image", "z-image", (1, 1536, 1536), "z-image-clear-r16"),
    Case("hunyuan-image", "hunyuan-image-2.1", (1, 3072, 3072), "hunyuan-image-clear-r16"),
    Case("wan", "wan2.1-1.3b", (33, 480, 832), "wan-radial"),
    Case("wan-animate", "wan2.2-animate-14b", (33, 480, 832), "wan-animate-radial"),
    Case("chrono-edit", "chrono-edit-14b", (29, 480, 832), "chrono-edit-radial"),
    Case("helios", "helios-14b", (33, 384, 640), "helios-radial"),
    Case("anyflow-far", "anyflow-far-14b", (37, 256, 416), "anyflow-far-chunk-growth"),
    Case("skyreels-v2", "skyreels-v2-14b-540p", (33, 480, 832), "skyreels-v2-radial"),
    Case("hunyuan-video", "hunyuan-video", (33, 480, 832), "hunyuan-video-radial"),
    Case("hunyuan-video-1.5", "hunyuan-video-1.5", (61, 480, 832), "hunyuan-video-1.5-radial"),
    Case("cogvideox", "cogvideox-2b", (33, 480, 720), "cogvideox-radial"),
    Case("mochi", "mochi-1", (43, 480, 848), "mochi-radial"),
    Case("ltx-video", "ltx-video-2b", (257, 512, 768), "ltx-video-radial"),
    Case("ltx-2", "ltx-2-19b", (241, 512, 768), "ltx-2-radial"),
    Case("kandinsky-5", "kandinsky-5-lite", (33, 512, 768), "kandinsky-5-radial"),
    Case("minimax-h3", "minimax-h3", (56, 480, 832), "minimax-h3-radial"),
)


def one_block_each(model: ModelConfig) -> ModelConfig:
    """The configuration of `model` with one block of each kind instead of dozens."""
    cut = {
        name: 1
        for name, value in model.config.items()
        if isinstance(value, int) and value > 1 and name.endswith(("layers", "blocks"))
    }
    if "dual_attention_layers" in model.config:
        cut["dual_attention_layers"] = (0,)
    if model.family == "wan-animate":
        cut["inject_face_latents_blocks"] = 1  # of as many blocks one has an adapter of faces
    return dataclasses.replace(model, config={**model.config, **cut})


def sparse_everywhere(recipe: str) -> Recipe:
    """A preset without its dense layers and steps, of which one block and one call would be."""
    return dataclasses.replace(resolve(recipe), dense_layers=0, dense_steps=0, min_tokens=0)


def built(model: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """The transformer with random weights on the CPU, but for what diffusers keeps in float32 in `dtype`."""
    import diffusers

    torch.manual_seed(0)
    transformer = getattr(diffusers, model.description.transformer)(**model.config).eval()
    kept = set(transformer._keep_in_fp32_modules or ())
    for name, weight in transformer.named_parameters():
        if kept.isdisjoint(name.split(".")):
            weight.data = weight.data.to(dtype)
    return transformer


def measure(case: Case, dtype: torch.dtype, repeats: int, here: dict[str, Any]) -> list[dict[str, str]]:
    """Rows of one case: times of a call, untouched and accelerated, and what was computed."""
    model = one_block_each(published(case.family, case.variant))
    transformer = built(model, dtype)
    generator = torch.Generator().manual_seed(0)
    inputs = model.inputs(
        transformer,
        model.grid(transformer, case.size),
        lambda *shape: torch.randn(shape, generator=generator).to(dtype),
    )
    heads, head_dim = model.description.heads(transformer)
    ours = copy.deepcopy(transformer, {id(weight): weight for weight in transformer.parameters()})
    with torch.inference_mode(), accelerated(ours, sparse_everywhere(case.recipe)) as handle:
        times = interleaved(
            lambda: transformer(**inputs), lambda: ours(**inputs), repeats, clock=time.process_time
        )
        density = handle.stats()["block_density"]
    tokens = model.layout(model.grid(transformer, case.size)).seq_len
    threads = torch.get_num_threads()
    seconds = [tuple(ms / 1e3 / threads for ms in quantiles) for quantiles in times]
    values = (heads, head_dim, tokens, density, *seconds)
    return [
        row("family_step", "transformer", metric, case.shape(dtype), value, here)
        for metric, value in zip(METRICS, values, strict=True)
    ]


def table(path: Path) -> str:
    """The Markdown table of the rows in a CSV, models in the order of `CASES`."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    order = [case.shape(dtype) for case in CASES for dtype in DTYPES]
    shapes = sorted({r["shape"] for r in rows}, key=[*order, *(r["shape"] for r in rows)].index)
    cells = []
    for shape in shapes:
        _, variant, size, recipe, dtype = shape.split()
        own = {r["metric"]: float(r["median"]) for r in rows if r["shape"] == shape}
        heads, dim, tokens, density, stock, ours = (own[metric] for metric in METRICS)
        cells.append(
            [variant, f"{heads:.0f} x {dim:.0f}", size.replace("x", " x "), f"{tokens:.0f}", recipe, dtype,
             f"{density:.3f}", f"{stock:.2f}", f"{ours:.2f}", f"{stock / ours:.2f}x"]
        )  # fmt: skip
    made = sorted({f"- {r['device']}; {r['versions']}; commit {r['commit']}" for r in rows})
    return (
        "# A step of every family, untouched and accelerated\n\n"
        "One call of each transformer, cut to one block of each kind, random weights, on a CPU: "
        "medians of calls taken in turn, in processor time over threads. What stands around the blocks "
        "(embeddings, the last projection) is as in the whole model, of which it is a smaller part. "
        "AnyFlow-FAR's own attention is FlexAttention, which uncompiled keeps all scores: its size is "
        "smaller, and any kernel saves time. Tokens are those of one chunk there. Written by `python -m "
        "dit_accel.evals.benchmarks.family_steps`.\n\n"
        + markdown(HEADINGS, cells)
        + "\n"
        + "\n".join(made)
        + "\n"
    )


def run(cases: Sequence[Case], dtype: torch.dtype, repeats: int, out: Path) -> None:
    """Measures these cases, and writes the CSV and the table after each."""
    here = environment()
    path = out / "family_steps_cpu.csv"
    for case in cases:
        rows = measure(case, dtype, repeats, here)
        kept = []
        if path.is_file():
            with path.open(newline="") as file:
                kept = [r for r in csv.DictReader(file) if r["shape"] != case.shape(dtype)]
            path.unlink()
        append(path, [*kept, *rows])
        (out / "family_steps_cpu.md").write_text(table(path))
        print(case.shape(dtype), *(f"{r['metric']} {r['median']}" for r in rows), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Measures all families, or those named."""
    parser = argparse.ArgumentParser(
        prog="python -m dit_accel.evals.benchmarks.family_steps", description=__doc__.split("\n\n")[0]
    )
    names = [case.family for case in CASES]
    parser.add_argument("--family", action="append", choices=names, help="these alone; default: all")
    fastest = "bfloat16" if multiplies_bf16(torch.device("cpu")) else "float32"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=fastest, help=f"here {fastest}")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each kind")
    parser.add_argument("--quick", action="store_true", help="one small case, once; written only with --out")
    parser.add_argument("--out", type=Path, help=f"folder of the CSV and the table (default {RESULTS})")
    options = parser.parse_args(arguments)
    cases = [case for case in CASES if options.family is None or case.family in options.family]
    if options.quick:
        cases = [Case("wan", "wan2.1-1.3b", (5, 128, 128), "wan-radial")]
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or (Path(folder) if options.quick else RESULTS)
        out.mkdir(parents=True, exist_ok=True)
        run(cases, getattr(torch, options.dtype), 1 if options.quick else options.repeats, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
