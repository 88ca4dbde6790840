"""The bundled feature extractor: a small convolutional net that reads the attributes of the bundled scenes.

    python -m dit_accel.scorers.scene_encoder train --run runs/scene-encoder
    python -m dit_accel.scorers.scene_encoder check

Its penultimate layer gives the features of `frechet-scenes`, `kid-scenes`, `mmd-scenes` and `prdc-scenes`. It
knows nothing but scenes drawn by `dit_accel.pipelines.tiny.scenes`: on other pictures its numbers mean
little, and none of them may be compared with FID.

Half of the training pictures are blurred, noisy or off in colour, and by how much is one of the things the
net tells, so that its features hold damage as well as content. The bundled weights (seed 0, one thread,
torch 2.13 on a CPU without AMX, 11 minutes) read everything in 0.992 of 512 scenes whose combinations were
not trained on. Shifts of colour move its features least.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dit_accel.files import atomic
from dit_accel.pipelines.tiny.scenes import BACKGROUNDS, COLOURS, POSITIONS, Scene, Split, render, sample
from dit_accel.pipelines.tiny.sprites import OBJECTS
from dit_accel.seeds import check_seed
from dit_accel.training_loop import Draw, Loop, Stage

WEIGHTS = Path(__file__).parent / "weights" / "scene-encoder.safetensors"
RUN = Path("runs") / "scene-encoder"
SIDE = 64  # pixels a side that pictures are resized to
FEATURES = 128
EMPTY = "nothing"
CLASSES = dict.fromkeys(POSITIONS, (EMPTY, *OBJECTS))  # what stands there
CLASSES |= {"colour": tuple(COLOURS), "background": BACKGROUNDS}
AMOUNTS = ("tone", "blur", "noise", "shift")  # told as numbers in [0, 1]
SIZES = {(64, 64): 6, (64, 96): 2, (96, 64): 2, (128, 128): 3, (192, 192): 1, (256, 256): 1}  # with weights
BATCH = 64
STAGE = Stage("scenes", steps=2500, rate=2e-3, averaging=0.995)
BLUR, NOISE, SHIFT = 0.03, 0.2, 0.2  # the strongest: deviation by the shorter side, and of values


class SceneEncoder(nn.Module):
    """Pictures (N, 3, 64, 64) in [-1, 1] to features (N, 128)."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width in (32, 64, 128, 128):
            layers += [nn.Conv2d(channels, width, 3, 2, 1), nn.GroupNorm(8, width), nn.SiLU()]
            channels = width
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * channels, FEATURES), nn.SiLU())
        self.classes = nn.ModuleDict(
            {name: nn.Linear(FEATURES, len(values)) for name, values in CLASSES.items()}
        )
        self.amounts = nn.Linear(FEATURES, len(AMOUNTS))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.body(pictures)


def load(path: Path = WEIGHTS) -> SceneEncoder:
    """The trained encoder in float32, for inference.

    Raises:
        ValueError: weights that are missing or another net's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with torch.device("meta"):  # no initial values, which would come from PyTorch's own generator
        encoder = SceneEncoder()
    try:
        encoder.load_state_dict(load_file(path), assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold the weights of the scene encoder: {error}") from error
    return encoder.float().eval().requires_grad_(False)


def resize(pictures: torch.Tensor, side: int = SIDE) -> torch.Tensor:
    """Pictures (N, 3, H, W) to squares, bicubic and antialiased."""
    if pictures.shape[-2:] == (side, side):
        return pictures
    return F.interpolate(pictures, (side, side), mode="bicubic", antialias=True)


def draw_picture(
    rng: random.Random, size: tuple[int, int], split: Split = "train", damaged: bool = False
) -> tuple[np.ndarray, dict[str, int | float]]:
    """A scene as float32 (height, width, 3) in [0, 1], a quarter of them a frame of a video, and its labels.

    `damaged` pictures are blurred, noisy, or off in colour.
    """
    video = rng.random() < 0.25
    scene = sample(rng, split, video=video)
    moment = rng.randrange(9) if video else 0
    window = (slice(moment, moment + 1), slice(None), slice(None))
    (picture,) = render(scene, *size, 9 if video else 1, window)
    damage = {"blur": 0.0, "noise": 0.0, "shift": 0.0}
    if damaged:
        kind = rng.choice(tuple(damage))
        damage[kind] = rng.random()
        picture = spoil(picture, kind, damage[kind], rng)
    return picture, _labels(scene) | damage


def values(attributes: Mapping[str, str]) -> dict[str, str]:
    """The class of each of `CLASSES` in a scene of such captioned attributes, see `Scene.attributes`."""
    places = {
        attributes[f"{which}position"]: attributes[f"{which}object"]
        for which in ("", "second ")
        if f"{which}object" in attributes
    }
    return {name: places.get(name, EMPTY) for name in POSITIONS} | {
        name: attributes[name] for name in ("colour", "background")
    }


def _labels(scene: Scene) -> dict[str, int | float]:
    """Indices of the classes, and what captions do not say in [0, 1]."""
    indices = {name: CLASSES[name].index(value) for name, value in values(scene.attributes).items()}
    return {**indices, "tone": (scene.tone - 0.94) / 0.12}


def spoil(picture: np.ndarray, kind: str, amount: float, rng: random.Random) -> np.ndarray:
    """`picture` (height, width, 3) with a `blur`, `noise` or colour `shift` of `amount` in [0, 1]."""
    from scipy.ndimage import gaussian_filter

    if kind == "blur":
        deviation = amount * BLUR * min(picture.shape[:2])
        return gaussian_filter(picture, (deviation, deviation, 0), mode="nearest")
    generator = np.random.default_rng(rng.getrandbits(32))
    if kind == "noise":
        return (picture + amount * NOISE * generator.standard_normal(picture.shape)).clip(0, 1)
    direction = generator.standard_normal(3)
    return (picture + amount * SHIFT * direction / np.linalg.norm(direction)).clip(0, 1)


def _batch(rng: random.Random) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Pictures of one size, resized, (N, 3, 64, 64) in [-1, 1], and their labels (N,) by name."""
    (size,) = rng.choices(tuple(SIZES), tuple(SIZES.values()))
    drawn = [draw_picture(rng, size, damaged=index % 2 == 1) for index in range(BATCH)]
    pictures = torch.from_numpy(np.stack([picture for picture, _ in drawn]).astype(np.float32))
    labels = {name: torch.tensor([label[name] for _, label in drawn]) for name in drawn[0][1]}
    return resize(pictures.permute(0, 3, 1, 2).contiguous()) * 2 - 1, labels


def loss(encoder: SceneEncoder, draw: Draw) -> torch.Tensor:
    """Cross-entropy of the attributes plus squared error of the amounts, on one batch."""
    pictures, labels = _batch(draw.rng)
    features = encoder(pictures)
    total = sum(F.cross_entropy(head(features), labels[name]) for name, head in encoder.classes.items())
    amounts = torch.stack([labels[name].float() for name in AMOUNTS], dim=1)
    return total + 5 * F.mse_loss(encoder.amounts(features), amounts)


@torch.no_grad()
def accuracy(encoder: SceneEncoder, count: int = 512, seed: int = 1) -> dict[str, float]:
    """Share of right classes on undamaged scenes of combinations never trained on, at all sizes."""
    rng = random.Random(seed)
    right = []
    for index in range(count):
        picture, labels = draw_picture(rng, tuple(SIZES)[index % len(SIZES)], "held_out")
        features = encoder(resize(torch.from_numpy(picture).permute(2, 0, 1)[None]) * 2 - 1)
        heads = encoder.classes.items()
        right.append([head(features).argmax().item() == labels[name] for name, head in heads])
    table = np.array(right)
    return dict(zip(encoder.classes, table.mean(0).tolist(), strict=True)) | {
        "all": table.all(1).mean().item()
    }


def train(
    run: Path = RUN,
    out: Path = WEIGHTS,
    *,
    seed: int = 0,
    resume: bool = False,
    stage: Stage = STAGE,
    until: int | None = None,
) -> Loop:
    """Trains, or goes on with the training in the folder `run`; at the end writes weights in half precision.

    The same seed, versions and number of threads give the same weights, interrupted at step `until` or not.
    """
    from safetensors.torch import save_file

    if not resume:
        shutil.rmtree(run, ignore_errors=True)
    with torch.random.fork_rng():
        torch.manual_seed(check_seed(seed))
        encoder = SceneEncoder()
    loop = Loop(stage, {"encoder": encoder}, run / "encoder.pt", seed, resume)
    loop.run(lambda draw, progress: loss(encoder, draw), until=until, save_every=100)
    if loop.done:
        loop.adopt_average()
        with atomic(out) as partial:
            save_file({name: value.half() for name, value in encoder.state_dict().items()}, partial)
    return loop


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dit_accel.scorers.scene_encoder", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train the encoder (resumable)")
    training.add_argument("--run", type=Path, default=RUN, help="folder of checkpoints")
    training.add_argument("--out", type=Path, default=WEIGHTS, help="safetensors file to write")
    training.add_argument("--resume", action="store_true", help="go on with the run in --run")
    training.add_argument("--seed", type=int, default=0)
    checking = commands.add_parser("check", help="accuracy on held-out scenes")
    checking.add_argument("--weights", type=Path, default=WEIGHTS)
    checking.add_argument("-n", "--samples", type=int, default=512)
    options = parser.parse_args(arguments)
    if options.command == "train":
        train(options.run, options.out, seed=options.seed, resume=options.resume)
        options.weights, options.samples = options.out, 512
    print(json.dumps(accuracy(load(options.weights), options.samples), indent=2))


if __name__ == "__main__":
    main()
