"""Trains a bundled model with dense attention: first its autoencoder, then transformer and text encoders.

All stages resume from checkpoints in the run folder; the pipeline folder is replaced whole at every save.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dit_accel.seeds import check_seed
from dit_accel.training_loop import Loop, Stage

from . import autoencoder
from .adapters import Adapter, adapter
from .flow import Flow, PositionProbe, TrainingSize, set_statistics
from .models import spec, weights_dir
from .text_encoders import start_from

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Curriculum:
    """How a model is trained: batches shrink with size, so that most steps cost about the same."""

    autoencoder: Stage | str  # or the bundled model whose trained autoencoder is taken as it is
    crops: int
    flow: Stage
    sizes: tuple[TrainingSize, ...]
    decoder: Stage | None = None  # more training for the decoder alone, on whole clips
    clips: dict[int, int] = field(default_factory=dict)  # their frames, with batch sizes
    # text encoders that start from those of another bundled model: (model, part)
    starts: dict[str, tuple[str, str]] = field(default_factory=dict)


HELD_OUT = 8  # scenes at each size, at most, on which the loss is watched
# Which of two objects stands where is learned at the smallest size alone: among others it hardly is. Large
# sizes are learned on some of the tokens at a time, many times cheaper, and at last on all.
IMAGES = (
    TrainingSize((1, 64, 64), 32, 6144, ((0.0, 1.0), (0.25, 0.2), (0.4, 0.13))),
    TrainingSize((1, 64, 96), 24, 1024, ((0.25, 0.03), (0.4, 0.02))),
    TrainingSize((1, 96, 64), 24, 1024, ((0.25, 0.03), (0.4, 0.02))),
    TrainingSize((1, 128, 128), 10, 3072, ((0.25, 0.2), (0.4, 0.1))),
    TrainingSize((1, 192, 128), 8, 512, ((0.25, 0.04), (0.4, 0.02))),
    TrainingSize((1, 256, 256), 8, 1024, ((0.25, 0.2), (0.4, 0.13)), tokens=1000),
    TrainingSize((1, 384, 384), 8, 1536, ((0.25, 0.3), (0.4, 0.6), (0.98, 0.1)), tokens=1000),
    TrainingSize((1, 256, 256), 4, 1024, ((0.98, 0.1),)),
    TrainingSize((1, 384, 384), 2, 1536, ((0.98, 0.4),)),
)
KNOWN_WORDS = (  # the same in fewer steps, for text encoders that start from another model's
    TrainingSize((1, 64, 64), 32, 6144, ((0.0, 1.0), (0.25, 0.12), (0.5625, 0.2))),
    TrainingSize((1, 64, 96), 24, 512, ((0.25, 0.02), (0.5625, 0.0))),
    TrainingSize((1, 96, 64), 24, 512, ((0.25, 0.02), (0.5625, 0.0))),
    TrainingSize((1, 128, 128), 10, 2048, ((0.25, 0.1), (0.5625, 0.08))),
    TrainingSize((1, 192, 128), 8, 512, ((0.25, 0.02), (0.5625, 0.0))),
    TrainingSize((1, 256, 256), 8, 1024, ((0.25, 0.1),), tokens=1000),
    TrainingSize((1, 384, 384), 8, 1536, ((0.25, 0.62),), tokens=1000),
)
VIDEOS = (  # objects are learned from pictures first
    TrainingSize((1, 64, 64), 32, 4096, ((0.0, 1.0), (0.2, 0.35), (0.45, 0.15))),
    TrainingSize((17, 64, 64), 6, 1536, ((0.2, 0.5), (0.45, 0.3))),
    TrainingSize((61, 64, 64), 3, 128, ((0.45, 0.03),), tokens=600),
    TrainingSize((17, 128, 128), 4, 256, ((0.2, 0.15), (0.45, 0.1)), tokens=700),
    TrainingSize((29, 128, 128), 3, 128, ((0.45, 0.05),), tokens=900),
    TrainingSize((65, 176, 176), 2, 128, ((0.45, 0.37),), tokens=1200),
    TrainingSize((65, 176, 176), 1, 128, ((0.985, 0.12),)),
)
NEW_WORDS = (  # the same for text encoders that start from nothing, which take more pictures
    TrainingSize((1, 64, 64), 32, 4096, ((0.0, 1.0), (0.3, 0.3), (0.5, 0.12))),
    TrainingSize((17, 64, 64), 6, 1024, ((0.3, 0.55), (0.5, 0.3))),
    TrainingSize((61, 64, 64), 3, 96, ((0.5, 0.03),), tokens=600),
    TrainingSize((17, 128, 128), 4, 192, ((0.3, 0.15), (0.5, 0.1)), tokens=700),
    TrainingSize((29, 128, 128), 3, 96, ((0.5, 0.05),), tokens=900),
    TrainingSize((65, 176, 176), 2, 96, ((0.5, 0.4),), tokens=1200),
    TrainingSize((65, 176, 176), 1, 96, ((0.985, 0.12),)),
)
CURRICULA: dict[str, Curriculum] = {
    "tiny-flux": Curriculum(
        autoencoder=Stage("vae", steps=1200, rate=2e-3, decay=0.5, averaging=0.99),
        crops=16,
        flow=Stage("flow", steps=9800, rate=1e-3, decay=0.75, averaging=0.995, muon=True),
        sizes=IMAGES,
    ),
    "tiny-sd3": Curriculum(
        autoencoder="tiny-flux",
        crops=16,
        flow=Stage("flow", steps=4000, rate=1e-3, decay=0.75, averaging=0.995, muon=True),
        sizes=KNOWN_WORDS,
        starts={"text_encoder_3": ("tiny-flux", "text_encoder_2")},
    ),
    "tiny-wan": Curriculum(
        autoencoder=Stage("vae", steps=2400, rate=3e-3, decay=0.5, averaging=0.99),
        crops=8,
        flow=Stage("flow", steps=4100, rate=1e-3, decay=0.75, averaging=0.995, muon=True),
        sizes=VIDEOS,
        decoder=Stage("decoder", steps=600, rate=2e-3, decay=0.6, averaging=0.99),
        clips={17: 4, 29: 2, 61: 1, 125: 1},
        starts={"text_encoder": ("tiny-flux", "text_encoder_2")},
    ),
    "tiny-hunyuan-video": Curriculum(
        autoencoder=Stage("vae", steps=3000, rate=2e-3, decay=0.8, averaging=0.99),
        crops=4,
        flow=Stage("flow", steps=5000, rate=1e-3, decay=0.7, averaging=0.995, muon=True),
        sizes=NEW_WORDS,
        decoder=Stage("decoder", steps=500, rate=1e-3, decay=0.7, averaging=0.99),
        clips={17: 2, 29: 1, 61: 1},
    ),
}


ORIGIN = ("_name_or_path", "is_local", "local_files_only")  # of a part that was loaded


def device(name: str = "auto") -> torch.device:
    """The device called ``name``; ``auto`` is a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def export(pipe: DiffusionPipeline, folder: Path) -> None:
    """Saves ``pipe`` in half precision, replacing the pipeline folder ``folder`` only once it is complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    dtypes = {name: part.dtype for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    kept = {name: {k: v.clone() for k, v in getattr(pipe, name).state_dict().items()} for name in dtypes}
    try:
        pipe.to(torch.float16)
        pipe.save_pretrained(partial, safe_serialization=True)
    finally:
        for name, dtype in dtypes.items():
            getattr(pipe, name).to(dtype).load_state_dict(kept[name])
    _portable(partial)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _portable(folder: Path) -> None:
    """Names the tokenizer class as all transformers releases know it, and the dtype to compute in.

    Tokenizers are saved with the padding of their last call, and configurations with where they came from,
    which is none of the model's.
    """
    for path in folder.rglob("*.json"):
        saved = json.loads(path.read_text())
        kept = {name: value for name, value in saved.items() if name not in ORIGIN}
        if kept != saved:
            path.write_text(json.dumps(kept, indent=2) + "\n")
    for path in [folder / "model_index.json", *folder.glob("*/tokenizer_config.json")]:
        path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    for path in folder.glob("*/tokenizer.json"):
        saved = json.loads(path.read_text())
        path.write_text(json.dumps({**saved, "padding": None, "truncation": None}, indent=2) + "\n")
    for path in folder.glob("text_encoder*/config.json"):
        config = json.loads(path.read_text())
        config.pop("torch_dtype", None)
        path.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")


class Training:
    """All stages of one model.

    Args:
        name: Of a bundled model.
        run: Folder of checkpoints and encoded scenes.
        out: Pipeline folder to write; None for the bundled one.
        steps: Of the last stage, instead of the curriculum's.
        curriculum: Instead of the model's own.
        init: Pipeline folder whose autoencoder is kept and whose other weights the last stage starts from.
    """

    def __init__(
        self,
        name: str,
        run: Path,
        out: Path | None = None,
        *,
        seed: int = 0,
        resume: bool = False,
        steps: int | None = None,
        device: torch.device | None = None,
        curriculum: Curriculum | None = None,
        init: Path | None = None,
    ):
        self.spec = spec(name)
        self.curriculum = curriculum or CURRICULA[name]
        if steps is not None:
            self.curriculum = replace(self.curriculum, flow=replace(self.curriculum.flow, steps=steps))
        self.run_folder, self.out, self.seed, self.resume = run, out or weights_dir(name), seed, resume
        self.device = device or torch.device("cpu")
        if not resume:
            shutil.rmtree(run, ignore_errors=True)
        self.start = run / "init"
        if init is not None and not self.start.exists():
            shutil.copytree(init, self.start)
        with torch.random.fork_rng():
            torch.manual_seed(check_seed(seed))
            self.pipe = self._pipeline().to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.adapter: Adapter = adapter(self.spec, self.pipe)

    def _pipeline(self) -> DiffusionPipeline:
        """A pipeline to train: new, or the one to start from."""
        if self.start.exists():
            from diffusers import DiffusionPipeline

            pipe = DiffusionPipeline.from_pretrained(self.start)
            pipe.vae.requires_grad_(False)
            return pipe
        pipe = self.spec.build()
        if isinstance(self.curriculum.autoencoder, str):
            kept = self.run_folder / "vae"  # that of the bundled model may change before this run resumes
            if not kept.exists():
                shutil.copytree(weights_dir(self.curriculum.autoencoder) / "vae", kept)
            pipe.vae = type(pipe.vae).from_pretrained(kept).requires_grad_(False)
        for name, (model, other) in self.curriculum.starts.items():
            start_from(getattr(pipe, name), weights_dir(model) / other)
        return pipe

    def run(self, minutes: float = math.inf, until: int | None = None) -> Loop:
        """Trains what is left, at most for ``minutes`` per stage; returns the last stage's loop."""
        if self.start.exists() or isinstance(self.curriculum.autoencoder, str):
            return self.flow(minutes, until)
        loop = self.autoencoder(minutes)
        if loop.done and self.curriculum.decoder is not None:
            loop = self.decoder(minutes)
        return self.flow(minutes, until) if loop.done else loop

    def autoencoder(self, minutes: float = math.inf) -> Loop:
        """Trains the autoencoder and measures its latents."""
        loop = self._loop(self.curriculum.autoencoder, {"vae": self.pipe.vae})
        loop.run(
            lambda draw, progress: autoencoder.loss(
                self.adapter, draw, progress, self.curriculum.crops, self.device
            ),
            minutes=minutes,
            log_every=20,
            save_every=100,
        )
        loop.adopt_average()
        self.pipe.vae.requires_grad_(False)
        if loop.done:
            set_statistics(self.adapter, self.spec.native, self.seed, self.device)
        return loop

    def decoder(self, minutes: float = math.inf) -> Loop:
        """Trains the decoder on, the latents as they are."""
        modules = {"decoder": self.pipe.vae.decoder, "post_quant_conv": self.pipe.vae.post_quant_conv}
        for module in modules.values():
            module.requires_grad_(True)
        for attention in filter(None, self.pipe.vae.decoder.mid_block.attentions):
            attention.requires_grad_(False)
        loop = self._loop(self.curriculum.decoder, modules)
        loop.run(
            lambda draw, progress: autoencoder.decoder_loss(
                self.adapter, draw, self.curriculum.clips, self.device
            ),
            minutes=minutes,
            log_every=20,
            save_every=100,
        )
        loop.adopt_average()
        self.pipe.vae.requires_grad_(False)
        return loop

    def flow(self, minutes: float = math.inf, until: int | None = None) -> Loop:
        """Trains transformer and text encoders, the autoencoder as it is."""
        position_probe = PositionProbe(self.adapter).to(self.device)
        loop = self._loop(self.curriculum.flow, {**self.adapter.trained, "position_probe": position_probe})
        loss = Flow(
            self.adapter, self.curriculum.sizes, self.run_folder, self.seed, self.device, position_probe
        )

        def save() -> None:
            with loop.averaged():
                export(self.pipe, self.out)
                losses = {
                    "x".join(map(str, size)): loss.held_out(size, min(batch, HELD_OUT))
                    for size, batch in {one.size: one.batch for one in self.curriculum.sizes}.items()
                }
            print("held-out loss: " + ", ".join(f"{size} {value:.3f}" for size, value in losses.items()))

        if loop.done:
            save()
        loop.run(loss, minutes=minutes, until=until, save_every=250, on_save=save)
        return loop

    def _loop(self, stage: Stage, modules: dict[str, torch.nn.Module]) -> Loop:
        return Loop(stage, modules, self.run_folder / f"{stage.name}.pt", self.seed, self.resume)
