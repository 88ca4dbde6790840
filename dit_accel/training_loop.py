"""The resumable training loop that distillation and the bundled models' stages share.

Every random draw of a step comes from generators seeded with (seed, stage, step), so a resumed run needs no
saved generator state to continue exactly as an uninterrupted one would.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dit_accel.seeds import generator


class Draw:
    """The random generators of one training step (or of one data set: any key that ``repr`` tells apart)."""

    def __init__(self, *key: object):
        seed = zlib.crc32(repr(key).encode())
        self.rng = random.Random(seed)
        self.generator = generator(seed)

    def normal(self, shape: Iterable[int]) -> torch.Tensor:
        return torch.randn(tuple(shape), generator=self.generator, dtype=torch.float32, device="cpu")

    def uniform(self, shape: Iterable[int]) -> torch.Tensor:
        return torch.rand(tuple(shape), generator=self.generator, dtype=torch.float32, device="cpu")


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for products of bfloat16.

    Where it has none PyTorch emulates them: on CPUs without AVX-512 BF16 and AMX tens of times slower than
    products of float32, and on NVIDIA GPUs before Ampere.
    """
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def mixed_precision(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 where the device multiplies it; elsewhere float32 stays."""
    return torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bf16(device))


@dataclass(frozen=True)
class Stage:
    """One training stage: its length, learning rate and averaging.

    The rate rises linearly for ``warmup`` steps, stays, and falls to a tenth over the last share ``decay``
    (0: it does not fall).
    With ``muon`` the matrices of repeated blocks are trained by Muon, scaled to AdamW's step size, and
    everything else by AdamW.
    """

    name: str
    steps: int
    rate: float
    warmup: int = 100
    decay: float = 0.3
    averaging: float = 0.998
    muon: bool = False

    def factor(self, step: int) -> float:
        """Learning rate at ``step`` relative to ``rate``."""
        left = (self.steps - step) / max(1.0, self.decay * self.steps) if self.decay else 1.0
        return min(1.0, (step + 1) / self.warmup) * (0.1 + 0.9 * min(1.0, left))


def _optimizers(
    stage: Stage, modules: dict[str, nn.Module], parameters: list[nn.Parameter]
) -> list[torch.optim.Optimizer]:
    """The stage's optimizers; between them they train each of ``parameters`` once."""
    matrices: list[torch.Tensor] = []
    if stage.muon:
        matrices = [
            layer.weight
            for module in modules.values()
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear)
            and layer.weight.requires_grad
            and any(part.isdigit() for part in name.split("."))  # in a list of blocks
        ]
    taken = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in parameters if id(parameter) not in taken]
    adam = torch.optim.AdamW(rest, lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    if not matrices:
        return [adam]
    if not hasattr(torch.optim, "Muon"):
        raise RuntimeError(f"training needs torch 2.9 or newer (torch.optim.Muon), got {torch.__version__}")
    muon = torch.optim.Muon(matrices, lr=stage.rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [adam, muon]


class Loop:
    """Trains ``modules`` on ``loss(draw, progress)`` and keeps an exponential average of their parameters.

    Args:
        stage: What to do.
        modules: Modules by name; parameters that do not require gradients stay as they are.
        checkpoint: File with everything needed to resume; read at once if ``resume`` and it exists.
        seed: Of all random draws.
        optimizers: Makes the optimizers of the parameters; by default those of the stage.
        joined: What to do with gradients before a step, such as adding up those of several processes.
        writes: Whether this process writes the checkpoint.
    """

    def __init__(
        self,
        stage: Stage,
        modules: dict[str, nn.Module],
        checkpoint: Path,
        seed: int = 0,
        resume: bool = False,
        *,
        optimizers: Callable[[list[nn.Parameter]], list[torch.optim.Optimizer]] | None = None,
        joined: Callable[[list[nn.Parameter]], None] | None = None,
        writes: bool = True,
    ):
        self.stage, self.modules, self.checkpoint, self.seed = stage, modules, checkpoint, seed
        every = [parameter for module in modules.values() for parameter in module.parameters()]
        self.parameters = [parameter for parameter in every if parameter.requires_grad]
        self.joined, self.writes = joined, writes
        if optimizers is None:
            self.optimizers = _optimizers(stage, modules, self.parameters)
        else:
            self.optimizers = optimizers(self.parameters)
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.step = 0
        if resume and checkpoint.exists():
            self._load()

    @property
    def done(self) -> bool:
        return self.step >= self.stage.steps

    def run(
        self,
        loss: Callable[[Draw, float], torch.Tensor],
        *,
        until: int | None = None,
        minutes: float = math.inf,
        log_every: int = 50,
        save_every: int = 500,
        on_save: Callable[[], None] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        """Trains to the end of the stage, step ``until`` or for ``minutes`` of processor time, then saves.

        ``loss`` returns the loss of a step, or, having propagated its gradients itself, one without a graph.
        ``on_step`` is called with the number of finished steps, in the place of what is printed otherwise.
        """
        until = min(until or self.stage.steps, self.stage.steps)
        started = time.process_time()
        losses: list[float] = []
        while self.step < until and time.process_time() - started < 60 * minutes:
            losses.append(self._update(loss))
            if on_step is not None:
                on_step(self.step)
            elif self.step % log_every == 0:
                spent = (time.process_time() - started) / len(losses)
                recent = losses[-log_every:]
                mean = sum(recent) / len(recent)
                place = f"{self.stage.name} {self.step}/{self.stage.steps}"
                print(f"{place}: loss {mean:.4f}, {spent:.2f} s of processor time per step", flush=True)
            if self.step % save_every == 0 or self.step == until:
                self.save()
                if on_save is not None:
                    on_save()
        if self.step < until:
            self.save()

    def _update(self, loss: Callable[[Draw, float], torch.Tensor]) -> float:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.stage.rate * self.stage.factor(self.step)
        value = loss(Draw(self.seed, self.stage.name, self.step), self.step / self.stage.steps)
        if value.requires_grad:
            value.backward()
        if self.joined is not None:
            self.joined(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        weight = 1 - min(self.stage.averaging, self.step / (self.step + 10))
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters], weight)
        return value.item()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the modules hold the averaged parameters."""
        trained = [parameter.detach().clone() for parameter in self.parameters]
        self.adopt_average()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, trained)

    def adopt_average(self) -> None:
        """Puts the averaged parameters into the modules."""
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.average)

    def save(self) -> None:
        """Writes the checkpoint; an interrupted write leaves the previous one."""
        if not self.writes:
            return
        state = {
            "stage": self.stage.name,
            "step": self.step,
            "average": self.average,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        with torch.no_grad():
            torch._foreach_copy_(self.average, state["average"])
        self.step = state["step"]
