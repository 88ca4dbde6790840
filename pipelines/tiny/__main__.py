"""Command line: ``python -m dit_accel.pipelines.tiny train|scenes|sheet|eval NAME``."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    """Trains a bundled model, draws scenes to distil it on, or a sheet of its samples."""
    parser = argparse.ArgumentParser(prog="python -m dit_accel.pipelines.tiny", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="train a bundled model (resumable)")
    train.add_argument("--minutes", type=float, default=math.inf, help="processor minutes per stage at most")
    train.add_argument("--steps", type=int, help="length of the last stage")
    train.add_argument("--resume", action="store_true", help="continue the run in --run instead of a new one")
    train.add_argument("--run", type=Path, help="folder of checkpoints (default: runs/NAME)")
    train.add_argument("--out", type=Path, help="pipeline folder to write (default: the bundled one)")
    train.add_argument("--init", type=Path, help="pipeline folder to start the last stage from")
    scenes = commands.add_parser("scenes", help="draw scenes with captions for `dit-accel distill --data`")
    scenes.add_argument("--out", type=Path, required=True, help="folder to write")
    scenes.add_argument("-n", type=int, default=256)
    scenes.add_argument("--native", action="store_true", help="at the native size instead of the demo size")
    scenes.add_argument("--seed", type=int, default=0)

    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    train.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")

    sheet = commands.add_parser("sheet", help="draw a contact sheet of held-out prompts")
    sheet.add_argument("--out", type=Path, required=True, help="PNG to write")
    evaluate = commands.add_parser("eval", help="measure attribute accuracy on held-out prompts")
    evaluate.add_argument("--n", type=int, default=256)
    evaluate.add_argument("--batch", type=int, default=16)
    for command in (sheet, evaluate):
        command.add_argument("--demo", action="store_true", help="at the demo size instead of the native one")
        command.add_argument("--steps", type=int, help="sampling steps (default: the model's)")
        command.add_argument("--guidance", type=float, help="guidance scale (default: the model's)")
        command.add_argument("--weights", type=Path, help="pipeline folder (default: the bundled one)")
        command.add_argument("--seed", type=int, default=0)

    from .models import SPECS

    for command in (train, scenes, sheet, evaluate):
        command.add_argument("name", choices=tuple(SPECS))
    options = parser.parse_args(arguments)
    {"train": _train, "scenes": _scenes, "sheet": _sheet, "eval": _evaluate}[options.command](options)


def _train(options: argparse.Namespace) -> None:
    import torch

    from .train import Training, device

    if options.threads:
        torch.set_num_threads(options.threads)
    Training(
        options.name,
        options.run or Path("runs") / options.name,
        options.out,
        seed=options.seed,
        resume=options.resume,
        steps=options.steps,
        device=device(options.device),
        init=options.init,
    ).run(options.minutes)


def _scenes(options: argparse.Namespace) -> None:
    from .models import spec
    from .scene_folder import write_scenes

    size = spec(options.name).native if options.native else None
    print(write_scenes(options.name, options.out, options.n, size, options.seed))


def _prepared(options: argparse.Namespace) -> tuple:
    """The pipeline and the settings that sheet and eval share."""
    from dit_accel.pipelines import load

    from .models import spec

    model = spec(options.name)
    pipe = load(options.weights or options.name)
    pipe.set_progress_bar_config(disable=True)
    frames, height, width = model.demo if options.demo else model.native
    settings = {
        "seed": options.seed,
        "size": (height, width),
        "frames": frames,
        "steps": options.steps or model.steps,
        "guidance": model.guidance if options.guidance is None else options.guidance,
    }
    return pipe, settings


def _sheet(options: argparse.Namespace) -> None:
    from PIL import Image

    from .evaluate import sheet

    pipe, settings = _prepared(options)
    grid = {"rows": 2, "columns": 2} if options.demo else {}
    Image.fromarray(sheet(pipe, **grid, **settings)).save(options.out)
    print(options.out)


def _evaluate(options: argparse.Namespace) -> None:
    from .evaluate import attribute_accuracy

    pipe, settings = _prepared(options)
    print(json.dumps(attribute_accuracy(pipe, options.n, batch=options.batch, **settings), indent=2))


if __name__ == "__main__":
    main()
