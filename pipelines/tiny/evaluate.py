"""How often a pipeline draws what its prompt says, on attribute combinations that were never trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dit_accel.media import beside
from dit_accel.seeds import generator
from dit_accel.training_loop import Draw

from .captions import caption
from .checker import check, score
from .models import TEXT_LENGTH
from .scenes import Scene, sample

NEGATIVE_PROMPT = ""


def held_out_scenes(n: int, seed: int = 0, video: bool = False) -> list[Scene]:
    """``n`` scenes that training never saw, the same for every model of a kind."""
    rng = Draw("held out", seed, video).rng
    return [sample(rng, "held_out", video) for _ in range(n)]


def is_video(pipe: Any) -> bool:
    """Whether ``pipe`` makes videos: its transformer's patches have a temporal side."""
    config = pipe.transformer.config
    patch = config.get("patch_size")
    return (isinstance(patch, (tuple, list)) and len(patch) == 3) or "patch_size_t" in config


def generate(
    pipe: Any,
    prompts: list[str],
    seeds: list[int],
    *,
    size: tuple[int, int],
    frames: int | None = None,
    steps: int = 20,
    guidance: float = 1.0,
) -> np.ndarray:
    """Calls ``pipe`` on a batch, one generator each: floats (B, H, W, 3), for videos (B, T, H, W, 3)."""
    arguments: dict[str, Any] = {
        "prompt": prompts,
        "height": size[0],
        "width": size[1],
        "num_inference_steps": steps,
        "max_sequence_length": TEXT_LENGTH,
        "generator": [generator(seed) for seed in seeds],
        "output_type": "np",
    }
    video = is_video(pipe)
    if video:
        arguments["num_frames"] = frames
    if "true_cfg_scale" in pipe.__call__.__annotations__:
        if guidance > 1:
            arguments |= {"true_cfg_scale": guidance, "negative_prompt": [NEGATIVE_PROMPT] * len(prompts)}
    else:
        arguments["guidance_scale"] = guidance
    output = pipe(**arguments)
    return np.asarray(output.frames if video else output.images)


def attribute_accuracy(
    pipe: Any,
    n: int = 256,
    seed: int = 0,
    *,
    size: tuple[int, int] = (64, 64),
    frames: int | None = None,
    steps: int = 20,
    guidance: float = 1.0,
    batch: int = 16,
    progress: bool = True,
    seen: Callable[[np.ndarray], object] | None = None,
) -> dict[str, Any]:
    """Accuracy of every captioned attribute over ``n`` held-out prompts, each with a seed of its own.

    Args:
        pipe: Any diffusers pipeline of a bundled family, accelerated or not.
        n: Number of prompt-seed pairs.
        seed: Of the draw of scenes; pair i starts from noise of seed ``1000 * seed + i``.
        size: Height and width in pixels.
        frames: Of a video; 17 if None.
        steps: Of the sampler.
        guidance: Classifier-free guidance scale; at most 1 is without.
        batch: Prompts per call.
        progress: Whether to show a progress bar, on stderr.
        seen: Called with the outputs of every batch, as ``generate`` returns them.

    Returns:
        Accuracy per attribute, their ``mean``, ``all_correct``, ``n`` and the ``settings``, fit for JSON.
    """
    from tqdm import tqdm

    video = is_video(pipe)
    frames = (frames or 17) if video else None
    scenes = held_out_scenes(n, seed, video)
    # The pipeline's own bar, one per batch, would tear this one.
    shown = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    predictions = []
    try:
        starts = range(0, n, batch)
        for start in tqdm(starts, "attributes", disable=not progress):
            chosen = scenes[start : start + batch]
            outputs = generate(
                pipe,
                [caption(scene) for scene in chosen],
                [1000 * seed + start + index for index in range(len(chosen))],
                size=size,
                frames=frames,
                steps=steps,
                guidance=guidance,
            )
            predictions += [check(output) for output in outputs]
            if seen is not None:
                seen(outputs)
    finally:
        pipe.set_progress_bar_config(**{"disable": False, **shown})
    settings = {
        "seed": seed,
        "size": list(size),
        "frames": frames,
        "steps": steps,
        "guidance": guidance,
        "split": "held_out",
    }
    return {**score(predictions, [scene.attributes for scene in scenes]), "settings": settings}


def sheet(
    pipe: Any,
    *,
    rows: int = 4,
    columns: int = 6,
    seed: int = 0,
    size: tuple[int, int] = (64, 64),
    **options: Any,
) -> np.ndarray:
    """Held-out scenes in rows, each as ``beside`` arranges it: uint8 (H, W, 3)."""
    scenes = held_out_scenes(rows * columns, seed, is_video(pipe))
    tiles = []
    for row in range(rows):
        chosen = scenes[row * columns : (row + 1) * columns]
        seeds = [1000 * seed + row * columns + index for index in range(columns)]
        prompts = [caption(scene) for scene in chosen]
        tiles.append(beside(generate(pipe, prompts, seeds, size=size, **options)))
    return (np.concatenate(tiles) * 255).round().astype(np.uint8)
