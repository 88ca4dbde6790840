"""One of several processes with a band of rows each: how far outputs are from those of one process alone.

Run as `python patch_parallel_cases.py RANK COUNT FOLDER FAMILY`; writes FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from tiny_families import FAMILIES

from dit_accel import Recipe, accelerated, disable, enable
from dit_accel.parallel import patch_parallel
from dit_accel.patterns import Clear, InwardWindow, Neighborhood

FEW = ("clear", "neighborhood", "uneven bands")  # of more than two processes
ROWS = 6  # of each process
CASES: dict[str, tuple[Recipe, dict[str, Any]]] = {
    "clear": (Recipe(Clear(3)), {}),
    "clear in model order": (Recipe(Clear(2.5), order="raster"), {}),
    "clear, hilbert, CFG, batch": (Recipe(Clear(3), order="hilbert"), {"batch": 2, "cfg": 3.0}),
    "wider in some heads": (Recipe({"all": Clear(2), "heads.1": Clear(3)}), {}),
    "neighborhood": (Recipe(Neighborhood(5)), {}),
    "even neighborhood": (Recipe(Neighborhood((4, 6))), {}),
    "inward window": (Recipe(InwardWindow((2, 3))), {}),
    "uneven bands": (Recipe(Clear(3)), {"rows": 1}),
    "pooled keys": (Recipe(Clear(3, downsample=2)), {}),
    "pooled keys, uneven bands": (Recipe(Clear(3, downsample=2)), {"rows": 1, "width": 7}),
    "averaged": (Recipe(Clear(3)), {"text": "averaged"}),
}


def main(rank: int, count: int, folder: Path, family: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=count)
    make, run = FAMILIES[family]
    pipe = make()
    grid = (ROWS * count, 8)
    before = run(pipe, grid=grid, steps=1)
    said: dict[str, dict[str, Any]] = {}
    for name in CASES if count == 2 else FEW:
        recipe, options = CASES[name]
        options = {"steps": 2, **options}
        options["grid"] = (grid[0] + options.pop("rows", 0), options.pop("width", grid[1]))
        text = options.pop("text", "exact")
        try:
            with accelerated(pipe, recipe):
                alone = run(pipe, **options)
            with patch_parallel(pipe, recipe, text=text) as handle:
                shared = run(pipe, **options)
            notes = handle.latest.notes["transformer"]["single.0"]
            said[name] = {
                "error": float((alone - shared).abs().max() / alone.abs().max()),
                "sent": handle.stats()["sent_bytes"],
                "halo": notes["halo bytes"],
                "same": [float(shared.double().sum()), float(shared.double().square().sum())],
            }
        except Exception:
            said[name] = {"raised": traceback.format_exc()}
    disable(pipe)
    said["restored"] = {"equal": torch.equal(before, run(pipe, grid=grid, steps=1))}
    said["refused"] = {"raised": ""}
    try:
        with patch_parallel(pipe, Clear(20)):
            run(pipe, grid=grid, steps=1)
    except ValueError as error:
        said["refused"] = {"raised": str(error)}
    try:
        with patch_parallel(pipe, Clear(3)):
            enable(pipe, Clear(3))
            run(pipe, grid=grid, steps=1)
    except Exception as error:
        said["replaced"] = {"raised": str(error)}
    (folder / f"{rank}.json").write_text(json.dumps(said, indent=1))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
