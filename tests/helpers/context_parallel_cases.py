"""One of several processes: for each case, how far its output is from that of one process alone.

Run as `python context_parallel_cases.py RANK COUNT FOLDER FAMILY...`, or `"FAMILY: CASE"` for one case;
writes FOLDER/RANK.json.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from dit_accel import Recipe, disable, enable, handle_of
from dit_accel.guidance import HeadPerturbation
from dit_accel.parallel import context_parallel
from dit_accel.patterns import (
    Calibrated,
    Clear,
    Clustered,
    Dense,
    Neighborhood,
    Radial,
    Rectified,
    Routed,
    Skipping,
    SparseVideoGen,
)

TESTS = Path(__file__).parents[1]
GRIDS = dict.fromkeys(("flux", "flux2", "sd3", "qwen"), (8, 12))
GRIDS |= dict.fromkeys(("wan", "hunyuan", "hunyuan15"), (3, 6, 8))
CONFIG = {
    "flux": {"num_attention_heads": 4},
    "flux2": {"num_attention_heads": 4},
    "wan": {"num_attention_heads": 4, "num_layers": 2},
    "qwen": {"num_attention_heads": 4, "num_layers": 2},
    "sd3": {
        "num_attention_heads": 4,
        "num_layers": 2,
        "caption_projection_dim": 64,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
    "hunyuan": {"num_attention_heads": 4, "num_layers": 1, "num_single_layers": 1},
    "hunyuan15": {"num_attention_heads": 4, "num_layers": 2},
}
CFG = {"steps": 2, "cfg": 3.0, "batch": 2}


def cases(family: str, transformer: Any) -> dict[str, tuple[Recipe, dict[str, Any]]]:
    """Recipes and how they are run."""
    import calibrations

    video = len(GRIDS[family]) == 3
    near = Neighborhood((3, 3, 3)) if video else Clear(3)
    far = Radial() if video else Neighborhood((1, 5, 5))
    guidance = HeadPerturbation(heads=[(0, 1), (0, 2), (1, 3)], tokens="image")
    found = {
        "dense": (Recipe(Dense()), {}),
        "static, CFG, a dense step and layer": (
            Recipe(near, order="hilbert", dense_steps=1, dense_layers=1), CFG | {"steps": 3},
        ),
        "static in model order": (Recipe(near, order="raster"), {"text_len": 8}),
        "per head": (Recipe({"heads.0": near, "heads.2-3": far}, order="hilbert"), {}),
        "calibrated": (Recipe(Calibrated(calibrations.drawn_for(transformer, GRIDS[family], steps=2))), {}),
        "tail": (Recipe(near, tail="pooled"), {}),
        "int8": (Recipe(near, quantization="int8"), {}),
        "dense int8": (Recipe(Dense(), quantization="int8"), {}),
        "routed": (Recipe(Routed(top_k=0.4, block_size=(16, 16), refresh=2)), {}),
        "routed, some heads": (Recipe({"heads.1-2": Routed(top_p=0.5, block_size=(16, 16))}), {}),
        "clustered": (Recipe(Clustered(4, 8)), {}),
        "rectified": (Recipe(Rectified(near, block_size=16), block_size=(16, 16)), {}),
        "skipping": (Recipe(Skipping()), {}),
        "guidance, CFG": (Recipe(near, order="hilbert", guidance=guidance), CFG),
        "guidance of dense layers": (
            Recipe(Dense(), guidance=HeadPerturbation(heads=[(0, 2)], kind="seg")), CFG,
        ),
    }  # fmt: skip
    if not video:
        found["pooled keys"] = Recipe(Clear(3, downsample=2)), {}
    if video:
        found["chosen by heads"] = Recipe(SparseVideoGen(keep=0.5, block_size=16)), {}
    return found


def main(rank: int, count: int, folder: Path, families: list[str]) -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, str(TESTS / "helpers"))
    spec = importlib.util.spec_from_file_location("conftest", TESTS / "conftest.py")
    tools = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tools)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=count)
    said: dict[str, dict[str, Any]] = {}
    for asked in families:
        family, _, only = asked.partition(": ")
        make, run = tools.FAMILIES[family]
        alone, shared = (make(**CONFIG[family]) for _ in range(2))
        context_parallel(shared)
        for name, (recipe, options) in cases(family, alone.transformer).items():
            if only not in ("", name):
                continue
            key, options = f"{family}: {name}", {"steps": 2, **options}
            said[key] = {}
            try:
                outputs = []
                for pipe in (alone, shared):
                    enable(pipe, recipe)
                    outputs.append(run(pipe, **options))
                stock = handle_of(alone).stats(), handle_of(shared).stats()
                scale = float(outputs[0].abs().max())
                said[key] = {
                    "error": float((outputs[0] - outputs[1]).abs().max()) / scale,
                    "densities": [one["density"] for one in stock],
                    "sent": stock[1]["sent_bytes"],
                    "calls": stock[1]["calls"],
                }
            except Exception:
                said[key] = {"raised": traceback.format_exc()}
            finally:
                disable(alone), disable(shared)
    (folder / f"{rank}.json").write_text(json.dumps(said, indent=1))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
