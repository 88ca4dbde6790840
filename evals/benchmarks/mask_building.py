"""Time and peak memory of building the masks of two large geometries, each in a process of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from dit_accel.kernels import default_block_size
from dit_accel.masks.layout import TokenLayout
from dit_accel.patterns import Clear, Neighborhood, Pattern, Radial

SECONDS, GIBIBYTES = 3.0, 2.0  # goals


@dataclass(frozen=True)
class MaskCase:
    """A pattern on the geometry of a real model, built with `order="auto"`."""

    name: str
    pattern: Pattern
    layout: TokenLayout


HUNYUAN_720P = TokenLayout((33, 45, 80))
FLUX_8K = TokenLayout((1, 512, 512), text_len=512, text_first=True)
MASK_CASES = (
    MaskCase("HunyuanVideo 720p", Radial(0.95), HUNYUAN_720P),
    MaskCase("HunyuanVideo 720p", Neighborhood((11, 23, 41)), HUNYUAN_720P),
    MaskCase("FLUX 8K", Clear(16), FLUX_8K),
)
GPU_BLOCKS = (128, 64)


def measure_masks() -> list[dict]:
    """A row per case and block size: seconds, gibibytes above an idle process, densities, goals passed."""
    rows = []
    for index, case in enumerate(MASK_CASES):
        for size in dict.fromkeys((default_block_size("cpu"), GPU_BLOCKS)):
            command = [sys.executable, "-m", __spec__.name, str(index), *map(str, size)]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            row = {"case": case, "block_size": size, **json.loads(run.stdout)}
            row["passed"] = row["seconds"] <= SECONDS and row["gib"] <= GIBIBYTES
            rows.append(row)
    return rows


def _peak_gib() -> float:
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would still have the peak of the process that started this one
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _measure(case: MaskCase, size: tuple[int, int]) -> dict:
    Clear(2).block_mask(TokenLayout((4, 16, 16)), size)  # what PyTorch loads on first use is not the mask's
    baseline, start = _peak_gib(), time.perf_counter()
    mask = case.pattern.block_mask(case.layout, size)
    seconds = time.perf_counter() - start
    densities = {"density": mask.density, "block_density": mask.block_density}
    return {"seconds": seconds, "gib": _peak_gib() - baseline, **densities}


if __name__ == "__main__":
    print(json.dumps(_measure(MASK_CASES[int(sys.argv[1])], (int(sys.argv[2]), int(sys.argv[3])))))
