"""What a distillation trains on: latents and the transformer's other inputs, made once and kept in files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dit_accel import latents, tensor_files
from dit_accel.arguments import shown
from dit_accel.errors import UnavailableError
from dit_accel.files import read_lines
from dit_accel.json_files import check_same, plain, read_json, write_json
from dit_accel.patterns import Dense
from dit_accel.pipelines.families.base import Family
from dit_accel.runtime.switching import accelerated
from dit_accel.seeds import generator
from dit_accel.training_loop import Draw

from . import capture
from .folders import Item, frames_of
from .identity import modules_of, told, weights_of
from .nested import has_tensors, put_together, taken_apart

KIND = "dit-accel distillation sample 2"
SETTINGS, EMPTY = "settings.json", "empty.safetensors"
Prompt = str | Mapping[str, Any]


@dataclass(frozen=True)
class Sample:
    """One sample: what a transformer denoises, and what else it is given.

    Attributes:
        latents: without noise, (1, ...) as the transformer is given them.
        inputs: others, tensors (1, ...) and lists of one, or as all samples share them.
        levels: noise levels at which steps begin, from 1 downwards.
        per_token: shape of a timestep beyond the samples.
    """

    latents: torch.Tensor
    inputs: Mapping[str, Any]
    levels: tuple[float, ...]
    per_token: tuple[int, ...] = ()

    @property
    def shapes(self) -> tuple:
        """What samples of one forward pass must share."""
        inputs = ((n, getattr(x, "shape", None)) for n, x in sorted(self.inputs.items()))
        return self.latents.shape, self.per_token, tuple(inputs)

    def with_text_of(self, other: Sample, family: Family) -> Sample:
        """The same latents with the text of another sample."""
        places = set(family.shared_inputs) - set(family.text_places)
        kept = {name: x for name, x in self.inputs.items() if name in places or not has_tensors(x)}
        return replace(self, inputs=family.with_other_text({**other.inputs, **kept}))

    def write(self, path: Path) -> None:
        """Into a file, whole or not at all."""
        found: list[torch.Tensor] = []
        inputs = {name: taken_apart(value, found) for name, value in self.inputs.items()}
        tensors = {"latents": self.latents, **{f"inputs.{place}": x for place, x in enumerate(found)}}
        fields = {"levels": list(self.levels), "per_token": list(self.per_token), "inputs": inputs}
        tensor_files.write(path, KIND, tensors, fields)

    @classmethod
    def read(cls, path: Path) -> Sample:
        """From its file.

        Raises:
            ValueError: a damaged file.
        """
        tensors, fields = tensor_files.read(path, KIND, "distillation sample", None)
        latents = tensors.pop("latents")
        found = [tensors[f"inputs.{place}"] for place in range(len(tensors))]
        inputs = {name: put_together(form, found) for name, form in fields["inputs"].items()}
        return cls(latents, inputs, tuple(fields["levels"]), tuple(fields["per_token"]))


class Samples:
    """Samples in a folder, made where they are missing.

    Args:
        folder: theirs.
        count: how many.
    """

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return Sample.read(self.path(index))

    def path(self, index: int) -> Path:
        """The file of a sample."""
        return self.folder / f"{index:06d}.safetensors"

    @property
    def empty(self) -> Sample:
        """One with the text of the empty prompt."""
        return Sample.read(self.folder / EMPTY)

    def make(
        self,
        make: Callable[[int], Sample],
        make_empty: Callable[[], Sample] | None,
        settings: Mapping[str, Any],
        state: Any,
        progress: bool,
    ) -> None:
        """Makes what is missing, each process its share.

        Args:
            make: makes a sample by its number.
            make_empty: makes the one of the empty prompt; None: it is not needed.
            settings: all that samples depend on.
            state: `accelerate.PartialState`.

        Raises:
            ValueError: the folder has samples made with other settings.
        """
        from tqdm import tqdm

        path = self.folder / SETTINGS
        if path.is_file():
            earlier = read_json(path, "settings of samples")
            check_same(earlier, settings, f"the samples in {self.folder} were made", "give another folder")
        elif state.is_main_process:
            write_json(path, settings)
        own = range(state.process_index, self.count, state.num_processes)
        missing = [index for index in own if not self.path(index).is_file()]
        bar = tqdm(total=len(own), initial=len(own) - len(missing), desc="samples", disable=not progress)
        with bar:
            for index in missing:
                make(index).write(self.path(index))
                bar.update()
        if make_empty is not None and state.is_main_process and not (self.folder / EMPTY).is_file():
            make_empty().write(self.folder / EMPTY)
        state.wait_for_everyone()


@contextmanager
def _dense(pipe: Any) -> Iterator[None]:
    """Samples are the untouched model's."""
    with accelerated(pipe, Dense()), torch.no_grad():
        yield


def generated(
    pipe: Any,
    family: Family,
    prompts: Sequence[Prompt],
    count: int,
    call: Mapping[str, Any],
    seed: int,
    empty: bool,
    folder: Path,
    state: Any,
    progress: bool,
) -> Samples:
    """Samples that the pipeline generates itself, as CLEAR is distilled: of each prompt in turn one.

    Args:
        prompts: texts, or mappings of arguments of the pipeline's call in their place.
        call: other arguments of it.
        seed: of noise, which is that of the number of a sample.
        empty: whether the text of the empty prompt is needed.
        folder: where they are kept; samples that are there are not made again.

    """

    def ran(prompt: Prompt, noise: torch.Generator, whole: bool) -> Sample:
        own = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
        with _dense(pipe):
            found = capture.run(pipe, family, {**call, **own, "generator": noise}, whole)
        made = _zeros(found) if found.latents is None else found.latents
        return Sample(made, found.inputs, found.levels, found.per_token)

    def make(index: int) -> Sample:
        return ran(prompts[index % len(prompts)], Draw(seed, "sample", index).generator, True)

    settings = {**_settings(pipe, call, seed, count), "prompts": _digest(map(_text, prompts))}
    samples = Samples(folder, count)
    make_empty = (lambda: ran("", generator(0), False)) if empty else None
    samples.make(make, make_empty, settings, state, progress)
    return samples


def encoded(
    pipe: Any,
    family: Family,
    items: Sequence[Item],
    call: Mapping[str, Any],
    empty: bool,
    folder: Path,
    state: Any,
    progress: bool,
) -> Samples:
    """Images or videos with their captions, encoded by the pipeline's autoencoder.

    Args:
        items: see `folders.read_folder`.
        call, empty, folder: as of `generated`; with `height` and `width` in `call` pictures are resized and
            cropped to these, with `num_frames` videos cut.

    Raises:
        ValueError: pictures of a size that the model does not take, or videos with too few frames.
        UnavailableError: a family whose latents are made otherwise.
    """
    if not family.encodes:
        raise UnavailableError(
            f"how pipelines of the family {family.name!r} encode pictures is not known; give prompts, of "
            "which the model generates its samples itself"
        )

    def captured(item: Item, caption: str, frames: Any) -> capture.FirstCall:
        size = {"height": frames.shape[1], "width": frames.shape[2]}
        size |= {"num_frames": len(frames)} if family.video else {}
        with _dense(pipe):
            found = capture.run(
                pipe, family, {**call, **size, "prompt": caption, "generator": generator(0)}, False
            )
        return found

    def make(index: int) -> Sample:
        item = items[index]
        frames = frames_of(item, call, family.video, getattr(pipe, "vae_scale_factor_temporal", 1))
        found = captured(item, item.caption, frames)
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)[None] / 255
        with torch.no_grad():
            made = latents.encoded(pipe, pixels, family.video)
        packs = hasattr(pipe, "_pack_latents")
        odd = packs and any(side % 2 for side in made.shape[-2:])
        if packs and not odd:
            made = latents.packed(made)
        if odd or tuple(made.shape[1:]) != found.shape:
            raise ValueError(
                f"{item.path} is {frames.shape[2]}x{frames.shape[1]} pixels and {len(frames)} frames, which "
                "this model does not take; give a `height` and `width` that it makes itself"
            )
        return Sample(made, found.inputs, found.levels, found.per_token)

    def make_empty() -> Sample:
        frames = frames_of(items[0], call, family.video, getattr(pipe, "vae_scale_factor_temporal", 1))
        found = captured(items[0], "", frames)
        return Sample(_zeros(found), found.inputs, found.levels, found.per_token)

    told = (f"{item.path.name} {item.path.stat().st_size} {item.caption}" for item in items)
    settings = {**_settings(pipe, call, 0, len(items)), "folder": _digest(told)}
    samples = Samples(folder, len(items))
    samples.make(make, make_empty if empty else None, settings, state, progress)
    return samples


def _zeros(found: capture.FirstCall) -> torch.Tensor:
    """Latents of a sample that is there for its text alone."""
    return torch.zeros(1, *found.shape, dtype=torch.float32, device="cpu")


def _settings(pipe: Any, call: Mapping[str, Any], seed: int, count: int) -> dict[str, Any]:
    config = {k: v for k, v in dict(pipe.transformer.config).items() if not k.startswith("_")}
    model = f"{type(pipe).__name__} {_digest([json.dumps(plain(config), sort_keys=True)])}"
    weights = weights_of(modules_of(pipe))
    return {"model": model, "weights": weights, "call": told(call), "seed": seed, "samples": count}


def _digest(texts: Any) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(told(prompt), sort_keys=True)


def is_folder(data: Any) -> bool:
    """Whether data is a folder, and not prompts or a file of them."""
    return isinstance(data, str | Path) and Path(data).is_dir()


def read_prompts(data: str | Path | Sequence[Prompt], empty: bool) -> list[Prompt]:
    """Prompts as given, or those of a text file, one on each line.

    Args:
        data: see `dit_accel.distill`.
        empty: whether the empty prompt is needed beside them.

    Raises:
        ValueError: no prompt, or no such file; `empty` with prompts that are no texts.
        TypeError: something else.
    """
    if isinstance(data, str | Path):
        if not Path(data).is_file():
            raise ValueError(f"`data` names {shown(str(data))}, and there is no such file or folder")
        return list(read_lines(data))
    if not isinstance(data, Sequence) or not all(isinstance(one, str | Mapping) for one in data):
        raise TypeError(f"`data` must be prompts, or the path of a file or folder, got {shown(data)}")
    if not data:
        raise ValueError("`data` must have at least one prompt, got none")
    if empty and not all(isinstance(prompt, str) for prompt in data):
        raise ValueError("`empty` must be 0 where prompts are not texts: nothing says what an empty one is")
    return list(data)
