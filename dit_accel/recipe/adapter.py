"""Adapters: what is tuned to a pattern, LoRA or whole weights, beside the base weights, in checked files.

A LoRA (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021) adds
``scale * B (A x)`` to the output of a linear layer, A (rank, in) and B (out, rank).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dit_accel.arguments import is_integer, is_number, shown
from dit_accel.files import atomic
from dit_accel.json_files import from_json, read_json, write_json

from .adapter_parts import DTYPES, LowRank, Part, in_files, learned_of, model_part, weights_part

BUNDLED = Path(__file__).parent / "adapters"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ABOUT = "made_by.json"
LEARNED_WEIGHTS = "attention.safetensors"  # beside LoRA, so that PEFT loads the folder as well
MODEL_CONFIG, MODEL_WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"  # of diffusers' models
KIND = "weights"  # in the configuration of a folder of whole weights, as its `kind`
TRANSFORMERS = ("transformer", "transformer_2")  # as pipelines name them, and folders and keys of files
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_KEY = re.compile(r"(?:base_model\.model\.)?([\w.]+)\.lora_([AB])(?:\.default)?\.weight")
# fields of PEFT's configuration that say nothing of what is computed: ranks are those of the tensors
_ANY_VALUE = {
    *("base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode", "task_type"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "r"),
    *("lora_dropout", "init_lora_weights", "qalora_group_size", "megatron_core", "lora_alpha", "use_rslora"),
    *("peft_type", "ensure_weight_tying", "runtime_config"),
}


class Adapter:
    """LoRA or whole weights that a recipe loads with its attention.

    Files are checked here; numbers are read when it acts.

    Args:
        path: the name of a bundled one; a PEFT folder (`adapter_config.json`, `adapter_model.safetensors`),
            or one of whole weights as `dit_accel.distill` writes it; a folder of such folders called
            `transformer` and `transformer_2`, for pipelines of two; or a `.safetensors` file: LoRA as
            diffusers saves it, or weights of attention layers (published CLEAR checkpoints), with keys that
            may begin with `transformer.` or `transformer_2.`; or a model's folder, of a pipeline or of its
            transformer, whose weights have what a pattern learns among them (FastWan).
        folder: what a relative path is relative to.

    Attributes:
        path: absolute.
        bundled: its name, or None.
        parts: by the pipeline's name of the transformer; `""` where none is named.

    Raises:
        ValueError: nothing there, pickled weights, a damaged file, keys that are neither LoRA nor weights of
            attention's linear layers nor learned weights, or options of PEFT that compute something else than
            LoRA.
    """

    def __init__(self, path: str | Path, folder: str | Path = "."):
        name = str(path)
        self.bundled = name if name in bundled() else None
        self.path = BUNDLED / name if self.bundled else (Path(folder) / path).absolute()
        try:
            self.parts = dict(_parts(self.path))
        except OSError as error:  # a name that is too long, a folder that may not be read
            raise ValueError(f"`adapter` {shown(name)} cannot be read: {error!s:.300}") from None

    def file(self) -> str:
        """What a recipe file calls it: its bundled name, or its path."""
        return self.bundled or str(self.path)

    @cached_property
    def digest(self) -> str:
        """Of its contents, 16 hexadecimal digits."""
        found = {
            name: (part.digest(), [getattr(x, "scale", 1) for x in part.layers.values()])
            for name, part in self.parts.items()
        }
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]

    def parts_of(self, names: tuple[str, ...]) -> dict[str, Part]:
        """The parts for the transformers of a pipeline, by its names of them; some may have none.

        Raises:
            ValueError: a part for a transformer that is not there, or it is not said for which one it is.
        """
        if "" in self.parts and len(names) > 1:
            raise ValueError(
                f"adapter {self.file()} does not say for which transformer it is, and this pipeline has "
                f"{' and '.join(names)}: make it a folder with a folder of each name"
            )
        unknown = sorted(set(self.parts) - {"", *names})
        if unknown:
            raise ValueError(
                f"adapter {self.file()} is for {' and '.join(self.parts)}, and there is no {unknown[0]} "
                "here; enable on the pipeline that has it"
            )
        return {name: self.parts[key] for name in names for key in ("", name) if key in self.parts}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Adapter) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Adapter({self.file()!r})"


def bundled() -> list[str]:
    """Names of the adapters that come with the library."""
    return sorted(path.name for path in BUNDLED.iterdir() if path.is_dir()) if BUNDLED.is_dir() else []


def write(
    folder: Path,
    tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    alpha: float,
    about: Mapping[str, Any] | None = None,
    learned: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
) -> None:
    """Save LoRA of one rank as a PEFT folder, which PEFT and diffusers load as well.

    Args:
        folder: to write.
        tensors: A (rank, in) and B (out, rank) by layer.
        alpha: the scale times the rank.
        about: what made it, plain data, for the file `ABOUT` in the folder.
        learned: what patterns have learned (`AttentionCall.learned`) by attention module and name, for a file
            of its own.
    """
    rank = next(iter(tensors.values()))[0].shape[0]
    pairs = {
        f"base_model.model.{name}.lora_{letter}.weight": x
        for name, pair in tensors.items()
        for letter, x in zip("AB", pair, strict=True)
    }
    _save(folder / WEIGHTS, pairs)
    if learned:
        _save(folder / LEARNED_WEIGHTS, in_files(learned))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": sorted(tensors)}
    _describe(folder, {**config, "bias": "none", "inference_mode": True}, about)


def write_weights(
    folder: Path,
    tensors: Mapping[str, tuple[torch.Tensor, ...]],
    about: Mapping[str, Any] | None = None,
    learned: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
) -> None:
    """Save whole weights as a folder: weight (out, in) and, where there is one, bias (out,) by layer.

    Args:
        folder, about, learned: as of `write`; learned weights stand in the same file.
        tensors: weight (out, in) and, where there is one, bias (out,) by layer.
    """
    named = {
        f"{name}.{kind}": x
        for name, own in tensors.items()
        for kind, x in zip(("weight", "bias"), own, strict=False)
    }
    _save(folder / WEIGHTS, {**named, **in_files(learned or {})})
    _describe(folder, {"kind": KIND}, about)


def _save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    with atomic(path) as temporary:
        found = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        save_file(found, str(temporary), metadata={"format": "pt"})


def _describe(folder: Path, config: Mapping[str, Any], about: Mapping[str, Any] | None) -> None:
    """Last, so that a folder that was not finished is none."""
    if about is not None:
        write_json(folder / ABOUT, about)
    write_json(folder / CONFIG, config)


# -- reading -------------------------------------------------------------------------------------------------


def _parts(path: Path) -> Iterator[tuple[str, Part]]:
    if path.is_file():
        yield from _of_file(path)
        return
    folders = {name: path / name for name in TRANSFORMERS if (path / name).is_dir()}
    flat = (path / CONFIG).exists() or (path / WEIGHTS).exists()
    if not path.is_dir() or flat or not folders:
        yield "", _of_folder(path)
    else:
        yield from ((name, _of_folder(one)) for name, one in folders.items())


def _of_folder(folder: Path) -> Part:
    """A PEFT folder, or one of whole weights."""
    config, weights = folder / CONFIG, folder / WEIGHTS
    if not folder.is_dir():
        known = f"; the bundled ones are {', '.join(bundled())}" if bundled() else ""
        raise ValueError(f"`adapter` names {shown(str(folder))}, and there is no such file or folder{known}")
    pickled = next((p for p in folder.iterdir() if p.suffix in _PICKLES), None)
    if pickled is not None and not weights.is_file():
        raise ValueError(_refuses_pickles(pickled))
    if not config.is_file() and not weights.is_file() and (folder / MODEL_CONFIG).is_file():
        return model_part(folder, {file: _header(file)[1] for file in _model_files(folder)})
    if not config.is_file() or not weights.is_file():
        missing = CONFIG if not config.is_file() else WEIGHTS
        raise ValueError(f"`adapter` {folder} is no PEFT folder: it has no {missing}")
    said = read_json(config, "PEFT's configuration")
    keys, shapes, _ = _header(weights)
    if said == {"kind": KIND}:
        return weights_part(weights, keys, shapes)
    part, learned = _part(weights, keys, shapes, _scale(said, str(config))), folder / LEARNED_WEIGHTS
    if not learned.is_file():
        return part
    keys, shapes, _ = _header(learned)
    return replace(part, learned=learned_of(learned, keys, shapes))


def _model_files(folder: Path) -> list[Path]:
    """The weights of a transformer, in one file or, by its index, in several."""
    index = folder / f"{MODEL_WEIGHTS}.index.json"
    if not index.is_file():
        names = [MODEL_WEIGHTS]
    else:
        of = read_json(index, "the index of a model's weights")
        told = of.get("weight_map") if isinstance(of, dict) else None
        names = list(told.values()) if isinstance(told, dict) else []
        names = sorted(set(names)) if all(isinstance(name, str) for name in names) else []
    missing = next((name for name in names if not (folder / name).is_file()), None)
    if not names or missing:
        lacks = f"it has no {missing}" if missing else f"{index.name} names no files"
        raise ValueError(f"`adapter` {folder} is a model's folder without its weights: {lacks}")
    return [folder / name for name in names]


def _of_file(path: Path) -> Iterator[tuple[str, Part]]:
    """A file as diffusers saves LoRA, or of whole weights."""
    if path.suffix in _PICKLES:
        raise ValueError(_refuses_pickles(path))
    keys, shapes, metadata = _header(path)
    try:
        said = from_json(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: its `lora_adapter_metadata` is no JSON: {error}") from None
    if not isinstance(said, dict):
        raise ValueError(f"{path} is damaged: its `lora_adapter_metadata` is no object")
    of: dict[str, list[str]] = {}
    for key in keys:
        first = key.partition(".")[0]
        of.setdefault(first if first in TRANSFORMERS else "", []).append(key)
    if "" in of and len(of) > 1:
        raise ValueError(f"{path} has keys with and without a transformer's name, such as {shown(of[''][0])}")
    for name, own in of.items():
        prefix = f"{name}." if name else ""
        config = {key.removeprefix(prefix): v for key, v in said.items() if key.startswith(prefix)}
        scale = _scale({"peft_type": "LORA", "lora_alpha": None, **config}, f"metadata of {path}")
        if any(".lora" in key for key in own):
            yield name, _part(path, own, shapes, scale, prefix)
        else:
            yield name, weights_part(path, own, shapes, prefix)


def _refuses_pickles(path: Path) -> str:
    return f"{path} is pickled, and could run anything when it is opened; save the adapter as safetensors"


def _header(path: Path) -> tuple[list[str], dict[str, tuple[list[int], str]], dict[str, str]]:
    """Keys, (shape, dtype) of each, and metadata of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            keys = list(file.keys())
            slices = {key: file.get_slice(key) for key in keys}
            shapes = {key: (list(x.get_shape()), str(x.get_dtype())) for key, x in slices.items()}
            return keys, shapes, file.metadata() or {}
    except (SafetensorError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path} is not a safetensors file: {error!s:.300}") from None


def _scale(config: Any, where: str) -> Any:
    """rank -> scale, by PEFT's configuration; an alpha of None is the rank."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise ValueError(f"{where}: `adapter` must be LoRA, got `peft_type` {shown(kind)}")
    given = {key: value for key, value in config.items() if key not in _ANY_VALUE and value}
    given.pop("bias", None) if config.get("bias") == "none" else None
    if given:
        raise ValueError(f"{where}: LoRA with `{next(iter(given))}` is not supported, only plain LoRA")
    alpha = config.get("lora_alpha", 8)  # PEFT's default
    if alpha is not None and not is_number(alpha):
        raise ValueError(f"{where}: `lora_alpha` must be a number, got {shown(alpha)}")
    root = config.get("use_rslora", False)
    return lambda rank: 1.0 if alpha is None else alpha / (math.sqrt(rank) if root else rank)


def _part(
    file: Path, keys: list[str], shapes: Mapping[str, tuple[list[int], str]], scale: Any, prefix: str = ""
) -> Part:
    pairs: dict[str, dict[str, str]] = {}
    for key in keys:
        match = _KEY.fullmatch(key.removeprefix(prefix))
        if match is None:
            raise ValueError(
                f"{file} has the key {shown(key)}, which is no LoRA of a linear layer as PEFT and diffusers "
                "name it (LAYER.lora_A.weight, LAYER.lora_B.weight)"
            )
        pairs.setdefault(match[1], {})[match[2]] = key
    if not pairs:
        raise ValueError(f"{file} is empty: it holds no LoRA")
    layers = {}
    for name, pair in pairs.items():
        missing = next((letter for letter in "AB" if letter not in pair), None)
        if missing is not None:
            raise ValueError(f"{file} has no lora_{missing} of {name}")
        (a, kind), (b, other) = (shapes[pair[letter]] for letter in "AB")
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not all(is_integer(n) and n > 0 for n in (*a, *b)):
            raise ValueError(
                f"{file}: the LoRA of {name} has the shapes {a} and {b}, not those of linear layers"
            )
        if not {kind, other} <= DTYPES:
            raise ValueError(
                f"{file}: the LoRA of {name} is in {kind} and {other}; save it in 16 or 32 bit floats"
            )
        layers[name] = LowRank(a[0], a[1], b[0], scale(a[0]))
    return Part(file, {name: (pair["A"], pair["B"]) for name, pair in pairs.items()}, layers)
