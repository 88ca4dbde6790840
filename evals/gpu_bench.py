"""Times the Triton kernel on this GPU: `python -m dit_accel.evals.gpu_bench`, or `make gpu-bench`.

Every case is first checked against float64 on a small geometry (error at most twice that of dense attention
in the same dtype, plus eps), and not timed if it fails. Then block-sparse attention is timed against
`scaled_dot_product_attention` and compiled FlexAttention with the same mask, and rows are appended to
`evals/results/gpu_bench.csv`. Without a GPU it prints what it would run and exits with 3.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..layout import TokenLayout
from ..patterns import Clear, Neighborhood, Pattern, Radial, SlidingTile

RESULTS = Path("evals/results/gpu_bench.csv")
UNAVAILABLE = 3
DTYPES = (torch.bfloat16, torch.float16)
WARM_UP, REPEATS = 5, 20


@dataclass(frozen=True)
class Case:
    """One geometry of a real model at a real size, and a pattern on it; `small` is where it is checked."""

    name: str
    layout: TokenLayout
    small: TokenLayout
    heads: int
    head_dim: int
    pattern: Pattern
    small_pattern: Pattern


def _flux(side: int) -> TokenLayout:
    return TokenLayout((1, side // 16, side // 16), text_len=512, text_first=True)


SMALL_IMAGE = TokenLayout((1, 24, 40), text_len=77, text_first=True)
SMALL_VIDEO = TokenLayout((7, 12, 20))
SMALL_HUNYUAN = TokenLayout((7, 12, 20), text_len=100)
WAN_720P = TokenLayout((21, 45, 80))
HUNYUAN_720P = TokenLayout((33, 45, 80), text_len=256)

CASES = (
    Case("flux-1024", _flux(1024), SMALL_IMAGE, 24, 128, Clear(16), Clear(6)),
    Case("flux-2048", _flux(2048), SMALL_IMAGE, 24, 128, Clear(16), Clear(6)),
    Case("flux-4096", _flux(4096), SMALL_IMAGE, 24, 128, Clear(16), Clear(6)),
    Case("wan-720p", WAN_720P, SMALL_VIDEO, 40, 128, Radial(0.2, first_frame_sink=True), Radial(0.2, 16)),
    Case("wan-720p", WAN_720P, SMALL_VIDEO, 40, 128, Neighborhood((9, 23, 41)), Neighborhood((3, 5, 7))),
    Case("hunyuan-720p", HUNYUAN_720P, SMALL_HUNYUAN, 24, 128, Radial(0.95), Radial(0.95, 16)),
    Case(
        "hunyuan-720p",
        HUNYUAN_720P,
        SMALL_HUNYUAN,
        24,
        128,
        SlidingTile((3, 3, 3)),
        SlidingTile((3, 3, 3), (2, 4, 4)),
    ),
)


def check(case: Case, dtype: torch.dtype) -> float:
    """Largest error of the kernel on the small geometry, as a multiple of what is allowed."""
    from ..kernels import block_sparse_attention

    mask = case.small_pattern.block_mask(case.small, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (2, 3, case.small.seq_len, case.head_dim)
    q, k, v = (torch.randn(shape, device="cuda", generator=generator).to(dtype) for _ in range(3))
    allowed = case.small_pattern.token_mask(case.small)
    if mask.order is not None:
        order = mask.order.cpu()
        allowed = allowed[order][:, order]
    allowed = allowed.cuda()
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=allowed)
    plain = scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    ours = block_sparse_attention(q, k, v, mask, backend="triton")
    bound = 2 * (plain - exact).abs().max() + torch.finfo(dtype).eps
    return float((ours - exact).abs().max() / bound)


def milliseconds(run: Callable[[], torch.Tensor]) -> list[float]:
    """The 20%, 50% and 80% quantiles of the time of one call, with a cold L2 cache."""
    from triton.testing import do_bench

    for _ in range(WARM_UP):
        run()
    return do_bench(run, rep=REPEATS * 20, quantiles=[0.2, 0.5, 0.8])


def measure(case: Case, dtype: torch.dtype) -> list[dict]:
    """One row per provider: time, density and speed-up against dense."""
    from ..kernels import block_sparse_attention, can_run, default_block_size

    size = default_block_size("cuda")
    mask = case.pattern.block_mask(case.layout, size, device="cuda")
    shape = (1, case.heads, case.layout.seq_len, case.head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(3))
    providers = {"sdpa": partial(scaled_dot_product_attention, q, k, v)}
    for backend in ("triton", "flex"):
        if can_run(backend, device="cuda", dtype=dtype, head_dim=case.head_dim, block_size=size) is None:
            providers[backend] = partial(block_sparse_attention, q, k, v, mask, backend=backend)
    rows = []
    for provider, run in providers.items():
        low, middle, high = milliseconds(run)
        rows.append(
            {
                "case": case.name,
                "pattern": str(case.pattern),
                "provider": provider,
                "dtype": str(dtype).removeprefix("torch."),
                "heads": case.heads,
                "tokens": case.layout.seq_len,
                "head_dim": case.head_dim,
                "density": round(mask.density, 4),
                "block_density": round(mask.block_density, 4),
                "ms_20": round(low, 4),
                "ms_50": round(middle, 4),
                "ms_80": round(high, 4),
            }
        )
    for row in rows:
        row["speedup"] = round(rows[0]["ms_50"] / row["ms_50"], 3)
    return rows


def append(path: Path, rows: list[dict]) -> None:
    """Adds rows to the CSV, with device and versions, and a header if it is new."""
    from ..cli.environment import environment

    here = environment()
    origin = {
        "device": here["gpus"][0]["name"],
        "torch": here["packages"]["torch"],
        "triton": here["packages"]["triton"],
        "commit": here["commit"],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *origin])
        if new:
            writer.writeheader()
        writer.writerows(row | origin for row in rows)


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device here; on a machine with one this would check and time:")
        for case in CASES:
            print(f"  {case.name}: {case.heads} heads x {case.layout.seq_len} tokens, {case.pattern}")
        print(f"in {' and '.join(str(dtype) for dtype in DTYPES)}, and append the results to {RESULTS}")
        return UNAVAILABLE
    failed = 0
    for case in CASES:
        for dtype in DTYPES:
            error = check(case, dtype)
            print(f"{case.name} {case.pattern} {dtype}: error {error:.2f} of the allowed", flush=True)
            if not error <= 1:
                print("  wrong, not timed")
                failed = 1
                continue
            rows = measure(case, dtype)
            append(RESULTS, rows)
            for row in rows:
                print(
                    f"  {row['provider']:8} {row['ms_50']:9.3f} ms  {row['speedup']:5.2f}x  "
                    f"density {row['density']}, blocks {row['block_density']}"
                )
    return failed


if __name__ == "__main__":
    sys.exit(main())
