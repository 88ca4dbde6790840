"""What it costs to choose by content: `python -m dit_accel.evals.benchmarks.choosing`.

For every online setting, on random q, k and v of one layer, in turn with PyTorch's dense attention of the
same: the time to score, select and list blocks, and that of the layer's whole attention, both as a share of
dense attention's. Calls are taken in turn (A B A B), so that other load on the machine falls on both; rows
are appended to `choosing_cpu.csv` and `choosing_cpu.md` is written anew, both under `--out`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.attention.call import AttentionCall
from dit_accel.attention.layer_masks import LayerMasks, layer_attention
from dit_accel.attention.run_memory import RunMemory
from dit_accel.environment import environment
from dit_accel.kernels import default_block_size
from dit_accel.masks.layout import TokenLayout
from dit_accel.patterns import Clustered, Pattern, Rectified, Routed, Skipping, SlidingTile

from .attention import interleaved
from .table import RESULTS, append, markdown, row

SETTINGS: dict[str, Pattern] = {
    "top 10%": Routed(top_k=0.1),
    "SpargeAttn": Routed(top_k=0.5, similarity=-0.1, smooth_keys=True),
    "XAttention": Routed(top_p=0.9, crossing=True, score="antidiagonal", stride=8, block_size=(128, 128)),
    "XAttention, stride 16": Routed(
        top_p=0.9, crossing=True, score="antidiagonal", stride=16, block_size=(128, 128)
    ),
    "Skip bits, a step that judges": Skipping(),
    "NABLA": Routed(top_p=0.4, crossing=True, union=SlidingTile((1, 3, 3), (1, 8, 8)), block_size=(64, 64)),
    "SVG2's clusters, a later step": Clustered(64, 128, top_p=0.5, iterations=(2, 2)),
    "Rectified": Rectified(mass=0.3, neighbours=False),
}
HEADINGS = ("setting", "block density", "choosing / dense", "attention / dense")
Quantiles = tuple[float, float, float]


def measure(
    pattern: Pattern, layout: TokenLayout, heads: int, head_dim: int, repeats: int
) -> tuple[float, Quantiles, Quantiles]:
    """Block density of a call, and what choosing and the whole attention take of dense attention's time."""
    device = torch.device("cpu")
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = torch.randn(3, 1, heads, layout.seq_len, head_dim, generator=generator, device=device)
    layer = layer_attention([pattern] * heads, LayerMasks(layout, "auto", default_block_size(device), device))
    memory = RunMemory().call("transformer", 0)  # in which every call is a first step
    call = AttentionCall(q, k, v, layout, dense=lambda call: call.q, memory=memory)

    def share(run: Callable[[], object]) -> Quantiles:
        dense, other = interleaved(lambda: scaled_dot_product_attention(q, k, v), run, repeats)
        low, middle, high = (time / dense[1] for time in other)
        return low, middle, high

    with torch.inference_mode():
        choosing, attending = share(lambda: layer.resolved(call)), share(lambda: layer(call))
    return float(call.notes["achieved"][1]), choosing, attending


def main(argv: list[str] | None = None) -> None:
    """The command; without `argv` of the process's own arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--grid", type=int, nargs=3, default=(8, 32, 32), help="tokens (F, H, W)")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    layout, here = TokenLayout(tuple(options.grid)), environment()
    shape = f"B1 H{options.heads} N{layout.seq_len} D{options.head_dim} fp32"
    rows, lines = [], []
    for name, pattern in SETTINGS.items():
        density, *times = measure(pattern, layout, options.heads, options.head_dim, options.repeats)
        for metric, quantiles in zip(("choosing / dense", "attention / dense"), times, strict=True):
            rows.append(row(name, "dit-accel", metric, shape, quantiles, here))
        lines.append([name, f"{density:.3f}", *(f"{t[1]:.1%} ({t[0]:.1%} to {t[2]:.1%})" for t in times)])
        print(" | ".join(lines[-1]))
    append(options.out / "choosing_cpu.csv", rows)
    text = f"Of the time of dense attention, {shape}, on random numbers; medians, 20% and 80% quantiles.\n\n"
    (options.out / "choosing_cpu.md").write_text(text + markdown(HEADINGS, lines))


if __name__ == "__main__":
    main()
