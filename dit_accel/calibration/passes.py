"""Passes of a calibration over its prompts: runs of the pipeline, watched, which can be gone on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from dit_accel import tensor_files
from dit_accel.attention.call import AttentionCall
from dit_accel.json_files import check_same, plain
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import Handle, accelerated
from dit_accel.seeds import generator

from .watching import Watched

STATE = "dit-accel calibration state 1"


class Pass(Protocol):
    """What is summed over the calls of all prompts.

    Attributes:
        name: of its file.
        settings: what its sums depend on beside the prompts.
    """

    name: str

    @property
    def settings(self) -> dict[str, Any]: ...

    def see(self, handle: Handle, layer: str, call: AttentionCall, out: torch.Tensor) -> None:
        """Adds one call of a layer."""

    def sums(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What it has summed, and plain data, to be kept in a file."""
        ...

    def restore(self, tensors: dict[str, torch.Tensor], data: dict[str, Any]) -> None:
        """Goes on from there."""


@dataclass
class Runs:
    """Runs of a pipeline on prompts.

    Attributes:
        pipe, prompts, seed, call, folder, progress: as of `calibrate`.
        options: of the calibration, that all of its passes depend on.
    """

    pipe: Any
    prompts: Sequence[str | Mapping[str, Any]]
    seed: int
    call: Mapping[str, Any]
    folder: Path | None
    progress: bool
    options: Mapping[str, Any]

    def do(self, one: Pass) -> None:
        """Lets a pass see every prompt that it has not seen; its file is written after each."""
        from tqdm import tqdm

        done = self._resumed(one)
        bar = tqdm(total=len(self.prompts), initial=done, desc=one.name, disable=not self.progress)
        with bar:
            for number in range(done, len(self.prompts)):
                self._run(one, number)
                if self.folder is not None:
                    tensors, data = one.sums()
                    fields = {"settings": self._settings(one), "done": number + 1, "data": data}
                    tensor_files.write(self._file(one), STATE, tensors, fields)
                bar.update()

    def _run(self, one: Pass, number: int) -> None:
        prompt = self.prompts[number]
        arguments = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
        arguments = {"output_type": "latent", **self.call, **arguments}
        handles: list[Handle] = []
        watched = Watched(lambda layer, call, out: one.see(handles[0], layer, call, out))
        with accelerated(self.pipe, Recipe(watched, order="raster")) as handle, torch.no_grad():
            handles.append(handle)
            self.pipe(generator=generator(self.seed + number), **arguments)

    def _file(self, one: Pass) -> Path:
        assert self.folder is not None
        return self.folder / f"{one.name}.safetensors"

    def _settings(self, one: Pass) -> dict[str, Any]:
        told = {key: _described(value) for key, value in sorted(self.call.items())}
        prompts = [_described(prompt) for prompt in self.prompts]
        return plain({**self.options, **one.settings, "call": told, "prompts": prompts})

    def _resumed(self, one: Pass) -> int:
        """How many prompts the folder's file has seen, which the pass goes on from."""
        if self.folder is None or not self._file(one).is_file():
            return 0
        tensors, fields = tensor_files.read(self._file(one), STATE, "calibration state", None)
        check_same(fields["settings"], self._settings(one), f"{self.folder} was begun", "another folder")
        one.restore(tensors, fields["data"])
        return int(fields["done"])


def _described(value: Any) -> Any:
    """What a setting is, in JSON's terms: tensors by their shape and sum."""
    if isinstance(value, torch.Tensor):
        return f"tensor {tuple(value.shape)} {value.double().sum().item():.12g}"
    if isinstance(value, Mapping):
        return {str(key): _described(item) for key, item in sorted(value.items())}
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(type(value).__name__)
