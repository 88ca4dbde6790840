"""One of several processes: for each case, how far its output is from that of one process alone.

Run as `python context_parallel_cases.py RANK COUNT FOLDER FAMILY...`, or `"FAMILY: CASE"` for one case;
writes FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from tiny_families import FAMILIES

from dit_accel import Recipe, disable, enable, handle_of, summary
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

PICTURES = ("flux", "flux2", "sd3", "qwen", "zimage", "hunyuanimage")
VIDEOS = ("wan", "hunyuan", "hunyuan15", "ltx", "ltx2", "cogvideox", "mochi", "kandinsky5", "chrono")
VIDEOS += ("helios",)
GRIDS = dict.fromkeys(PICTURES, (8, 12)) | dict.fromkeys(VIDEOS, (3, 6, 8))
GRIDS["zimage"] = (9, 11)  # which 29 more tokens fill up
ALL = ("flux", "wan", "flux2", "sd3", "qwen", "hunyuan", "hunyuan15")  # the others have the cases FEW
FEW = ("dense", "static, CFG, a dense step and layer", "per head", "int8", "routed", "guidance, CFG")
FOUR = {"num_attention_heads": 4}
CONFIG = {
    "flux": FOUR,
    "flux2": FOUR,
    "wan": FOUR | {"num_layers": 2},
    "qwen": FOUR | {"num_layers": 2},
    "sd3": {
        "num_attention_heads": 4,
        "num_layers": 2,
        "caption_projection_dim": 64,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
    "hunyuan": {"num_attention_heads": 4, "num_layers": 1, "num_single_layers": 1},
    "hunyuan15": {"num_attention_heads": 4, "num_layers": 2},
    "zimage": {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4},
    "hunyuanimage": FOUR,
    "ltx": FOUR | {"num_layers": 2, "cross_attention_dim": 64},
    "ltx2": FOUR
    | {"num_layers": 2, "cross_attention_dim": 64, "audio_num_attention_heads": 4}
    | {"audio_cross_attention_dim": 32},
    "cogvideox": FOUR | {"num_layers": 2},
    "mochi": FOUR | {"num_layers": 2},
    "kandinsky5": {"model_dim": 64, "num_visual_blocks": 2},
    "chrono": FOUR | {"num_layers": 2},
    "helios": FOUR | {"num_layers": 2},
}
CFG = {"steps": 2, "cfg": 3.0, "batch": 2}


def cases(family: str, transformer: Any) -> dict[str, tuple[Recipe | None, dict[str, Any]]]:
    """Recipes and how they are run; None is diffusers' own attention."""
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
        "last heads": (Recipe({"heads.2-3": near}, guidance=guidance), CFG),
        "calibrated": (Recipe(Calibrated(calibrations.drawn_for(transformer, GRIDS[family], steps=2))), {}),
        "tail": (Recipe(near, tail="pooled"), {}),
        "int8": (Recipe(near, quantization="int8"), {}),
        "dense int8": (Recipe(Dense(), quantization="int8"), {}),
        "routed": (Recipe(Routed(top_k=0.4, block_size=(16, 16), refresh=2)), {}),
        "routed, some heads": (Recipe({"heads.1-2": Routed(top_p=0.5, block_size=(16, 16))}), {}),
        "routed, last heads": (
            Recipe({"heads.2-3": Routed(top_p=0.5, block_size=(16, 16), refresh=2)}), {"steps": 3},
        ),
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
    if family not in ALL:
        few = (
            FEW[:-1] if family == "zimage" else FEW
        )  # which takes and gives lists, so that there is no guidance
        found = {name: found[name] for name in few}
    if getattr(transformer, "_cp_plan", None) is not None:
        found["stock, CFG"] = None, CFG
    return found


def sizes_of(pipe: Any) -> list[int]:
    """Tokens, channels and number of the layers of a pipeline that was run."""
    binding = handle_of(pipe).bindings["transformer"]
    return [binding.geometry.layout.seq_len, binding.heads * binding.head_dim, len(binding.layers)]


def run_alone(run: Any, pipe: Any, recipe: Recipe | None, options: dict[str, Any]) -> torch.Tensor | str:
    """A pipeline's output, or a text that says what it raised."""
    try:
        if recipe is not None:
            enable(pipe, recipe)
        return run(pipe, **options)
    except Exception:
        return traceback.format_exc()
    finally:
        disable(pipe)


def main(rank: int, count: int, folder: Path, families: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=count)
    said: dict[str, dict[str, Any]] = {}
    for asked in families:
        family, _, only = asked.partition(": ")
        make, run = FAMILIES[family]
        alone, shared = (make(**CONFIG[family]) for _ in range(2))
        context_parallel(shared)
        for name, (recipe, options) in cases(family, alone.transformer).items():
            if only not in ("", name):
                continue
            key, options = f"{family}: {name}", {"steps": 2, "grid": GRIDS[family], **options}
            said[key] = {}
            turn = len(said) % count  # one process runs it alone, another one the next
            told: list[Any] = [run_alone(run, alone, recipe, options) if rank == turn else None]
            torch.distributed.broadcast_object_list(told, src=turn)
            (expected,) = told
            try:
                if isinstance(expected, str):
                    raise RuntimeError(expected)
                if recipe is not None:
                    enable(shared, recipe)
                output = run(shared, **options)
                said[key] = {"error": float((expected - output).abs().max() / expected.abs().max())}
                if recipe is not None:
                    stats = handle_of(shared).stats()
                    said[key] |= {
                        "sent": stats["sent_bytes"],
                        "calls": stats["calls"],
                        "sizes": sizes_of(shared),
                        "balance": [
                            (one.groups, one.neighbours, one.balanced)
                            for one in handle_of(shared).bindings["transformer"].geometry.balances.values()
                        ],
                        "summary": str(summary(shared)),
                    }
            except Exception:
                said[key] = {"raised": traceback.format_exc()}
            finally:
                disable(shared)
    (folder / f"{rank}.json").write_text(json.dumps(said, indent=1))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
