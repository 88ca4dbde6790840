"""Recipes: which pattern, where (layers, heads, steps), in which format."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from dit_accel import patterns
from dit_accel.arguments import is_integer, shown, switch
from dit_accel.files import write_text
from dit_accel.guidance.perturbation import HeadPerturbation
from dit_accel.kernels import TAILS, quantizations
from dit_accel.masks.tiles import check_block_size
from dit_accel.patterns import Pattern
from dit_accel.patterns.plain import from_plain, to_plain

from . import dense, files
from .adapter import Adapter
from .noise import NoiseRange

PRESETS = Path(__file__).parent / "presets"
_OF_LAYERS = ("tail", "quantization")  # one value, or a mapping from layer selectors
_ORDERS = ("auto", "raster", "tile", "hilbert")


@dataclass(frozen=True)
class Recipe:
    """What to accelerate and how. See `dit_accel.enable`.

    Args:
        attention: one pattern for every layer, or a mapping from layer selector (see
            `dit_accel.recipe.selectors`) to pattern, later entries overriding earlier ones. What no selector
            names keeps the model's own attention.
        dense_layers: layers that keep the model's own attention: an int for the first n, or a set of flat
            indices, negative ones counting from the end.
        dense_steps: sampler steps at which all layers do, in the same two forms, or a float: the first
            fraction of the steps, rounded up; or `{"sigma": (low, high)}`: the steps that begin at a noise
            level of the flow in this range, whose ends are included (`dit_accel.recipe.NoiseRange`). One
            range suits runs of 4 and of 50 steps.
        quantization: numeric format in which the layers that `attention` names multiply q, k and v, under
            `Dense()` as well: `"int8"`, `"int8-fp8"`, `"int8-int8"` or `"int8-int4"`
            (`dit_accel.kernels.block_sparse_attention`), or a mapping from layer selectors to these or None;
            None: their own. Dense layers and dense steps are the model's own attention, and not quantized.
        tail: `"pooled"`: key blocks that a query's block does not compute contribute by the means of their
            keys and values (`dit_accel.kernels.block_sparse_attention`), or a mapping from layer selectors to
            `"pooled"` or None, later entries overriding earlier ones; None: they contribute nothing.
        guidance: a `HeadPerturbation` of `dit_accel.guidance`, or None.
        adapter: LoRA that was tuned to the pattern, loaded and unloaded with it, beside any of the user's: a
            PEFT folder, a safetensors file, a bundled name (`dit_accel.recipe.adapter.Adapter`), or None. It
            acts at every step and in every layer that it names, dense ones too.
        guard: whether a run raises where its prediction turns NaN or infinite, instead of going on to a black
            picture (`dit_accel.NonFiniteError`, naming the layer).
        backend: kernel of `dit_accel.kernels.block_sparse_attention`.
        block_size: (query, key) block sizes; None takes the default of the device.
        order: token order, see `Pattern.block_mask`.
        min_tokens: layers that attend to fewer tokens keep the model's own attention: a number, or `"auto"`
            for the length from which sparse attention was measured to be faster on the device, at the layer's
            density (`dit_accel.runtime.measured_speed.MeasuredSpeed.break_even`).
        family: the model family this recipe is for, or None for any.
        name, source: what it is called and where its numbers come from; not compared.

    Raises:
        ValueError, TypeError: a value outside these forms.
    """

    attention: Pattern | Mapping[str, Pattern]
    dense_layers: int | Iterable[int] = 0
    dense_steps: int | float | Iterable[int] | Mapping[str, tuple[float, float]] | NoiseRange = 0
    quantization: str | Mapping[str, str | None] | None = None
    tail: str | Mapping[str, str | None] | None = None
    guidance: HeadPerturbation | None = None
    adapter: Adapter | str | Path | None = None
    guard: bool = True
    backend: str = "auto"
    block_size: tuple[int, int] | None = None
    order: str = "auto"
    min_tokens: int | str = 0
    family: str | None = None
    name: str = field(default="", compare=False)
    source: str = field(default="", compare=False, repr=False)

    def __post_init__(self):
        if isinstance(self.attention, Mapping):
            object.__setattr__(self, "attention", dict(self.attention))
        chosen = self.attention.values() if isinstance(self.attention, dict) else [self.attention]
        if not chosen or not all(isinstance(p, Pattern) for p in chosen):
            raise TypeError(
                f"`attention` must be a pattern of `dit_accel.patterns` or a mapping from layer selectors to "
                f"patterns, got {shown(self.attention)}"
            )
        object.__setattr__(self, "dense_layers", dense.checked_layers(self.dense_layers))
        object.__setattr__(self, "dense_steps", dense.checked_steps(self.dense_steps))
        if self.block_size is not None:
            check_block_size(self.block_size)
            object.__setattr__(self, "block_size", tuple(map(int, self.block_size)))
        if self.guidance is not None and not isinstance(self.guidance, HeadPerturbation):
            raise TypeError(
                "`guidance` must be a `HeadPerturbation` of `dit_accel.guidance` or None, got "
                f"{shown(self.guidance)}"
            )
        if isinstance(self.adapter, str | Path):
            object.__setattr__(self, "adapter", Adapter(self.adapter))
        if not isinstance(self.adapter, Adapter | None):
            raise TypeError(
                "`adapter` must be the path of a LoRA folder or file, a bundled name or None, got "
                f"{shown(self.adapter)}"
            )
        for name, known in (("tail", TAILS), ("quantization", (*quantizations(), None))):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                value = dict(value)
                object.__setattr__(self, name, value)
            asked = list(value.values()) if isinstance(value, dict) else [value]
            if not asked or not all(one is None or (isinstance(one, str) and one in known) for one in asked):
                names = ", ".join(repr(one) for one in known if one is not None)
                raise ValueError(
                    f"`{name}` must be {names}, None or a mapping from layer selectors to these, got "
                    f"{shown(value)}"
                )
        for name in ("attention", *_OF_LAYERS):
            value = getattr(self, name)
            if isinstance(value, dict) and not all(isinstance(selector, str) for selector in value):
                raise TypeError(f"layer selectors of `{name}` must be text, got {shown(list(value))}")
        switch("guard", self.guard)
        for name in ("backend", "order", "name", "source"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"`{name}` must be text, got {shown(getattr(self, name))}")
        if not isinstance(self.family, str | None):
            raise TypeError(f"`family` must be text or None, got {shown(self.family)}")
        if self.order not in _ORDERS:
            orders = ", ".join(map(repr, _ORDERS))
            raise ValueError(f"`order` must be one of {orders}, got {shown(self.order)}")
        if is_integer(self.min_tokens) and self.min_tokens >= 0:
            object.__setattr__(self, "min_tokens", int(self.min_tokens))
        elif not (isinstance(self.min_tokens, str) and self.min_tokens == "auto"):
            raise ValueError(
                "`min_tokens` must be a whole number of tokens from 0 or 'auto', got "
                f"{shown(self.min_tokens)}"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.content == other.content

    def __hash__(self) -> int:
        return hash(self.tag)

    def __repr__(self) -> str:
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if f.repr and getattr(self, f.name) != f.default
        ]
        return f"Recipe({', '.join(shown)})"

    def check_family(self, family: str, found: str) -> None:
        """Raises ValueError if this recipe is for another family than `family`; `found` ends the message."""
        if self.family not in (None, family):
            what = f"preset {self.name!r}" if self.name else "recipe"
            raise ValueError(f"{what} is for the family {self.family!r}, but {found}")

    @property
    def content(self) -> dict[str, Any]:
        """All that is compared, as plain data; selectors are pairs in a list, since their order matters."""
        plain = dataclasses.replace(self, guidance=None, name="", source="")._to_dict(files=False)
        for name in ("attention", *_OF_LAYERS):
            if isinstance(getattr(self, name), dict):
                plain[name] = list(map(list, plain[name].items()))
        if self.guidance is not None:
            plain["guidance"] = repr(self.guidance)
        return plain

    @property
    def tag(self) -> str:
        """A short name for file names and CSV rows, the same for equal recipes: `"clear-16-0c1d9e"`."""
        label = self.name
        if not label:
            chosen = self.attention.values() if isinstance(self.attention, dict) else [self.attention]
            label = "+".join(dict.fromkeys(_slug(p) for p in chosen))
            label += "+tail" if self.tail else ""
            given = self.quantization
            formats = given.values() if isinstance(given, dict) else [given]
            label += "".join(f"+{one}" for one in dict.fromkeys(formats) if one)
            label += f"+{self.guidance.kind}" if self.guidance else ""
            label += "+adapter" if self.adapter else ""
        digest = hashlib.sha1(json.dumps(self.content, sort_keys=True).encode()).hexdigest()
        return f"{re.sub(r'[^A-Za-z0-9.+-]+', '-', label)[:48]}-{digest[:6]}"

    def dense_layer_indices(self, layers: int) -> frozenset[int]:
        """Flat indices of the dense layers of a model with `layers` layers.

        Raises:
            ValueError: an index that this model does not have.
        """
        return dense.layer_indices(self.dense_layers, layers)

    @property
    def needs_total(self) -> bool:
        """Whether the dense steps depend on how many steps a run has."""
        return dense.needs_total(self.dense_steps)

    @property
    def patterns(self) -> list[Pattern]:
        """Those of all layers, in the order of their selectors."""
        chosen: Any = self.attention  # a mapping is a dict since it was checked
        return list(chosen.values()) if isinstance(chosen, dict) else [chosen]

    @property
    def needs_noise(self) -> bool:
        """Whether what is computed depends on the noise level."""
        return isinstance(self.dense_steps, NoiseRange) or any(p.by_noise for p in self.patterns)

    def is_dense_step(self, step: int, total: int | None, sigma: float | None = None) -> bool:
        """Whether sampler step `step` of `total` (None: not known), at noise level `sigma`, is dense.

        Raises:
            ValueError: the answer depends on a total or on a noise level that is not known.
        """
        return dense.is_dense_step(self.dense_steps, step, total, sigma)

    # -- files ---------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data for YAML or JSON; fields at their defaults are left out.

        Raises:
            ValueError: what has no plain form: a `guidance` with a schedule, a calibration without a file.
        """
        return self._to_dict(files=True)

    def _to_dict(self, files: bool) -> dict[str, Any]:
        """Without `files`, what they hold is there by its digest."""
        order = ("name", "family", "source", "attention")
        fields = sorted(
            dataclasses.fields(self), key=lambda f: order.index(f.name) if f.name in order else len(order)
        )
        data = {f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) != f.default}
        if isinstance(self.attention, dict):
            data["attention"] = {selector: to_plain(p, files) for selector, p in self.attention.items()}
        else:
            data["attention"] = to_plain(self.attention, files)
        if self.guidance is not None:
            data["guidance"] = self.guidance.to_dict()
        if isinstance(self.adapter, Adapter):
            data["adapter"] = self.adapter.file() if files else self.adapter.digest
        return {key: _plain(value) for key, value in data.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], folder: str | Path = ".") -> Recipe:
        """The inverse of `to_dict`; files that it names, `guidance` as JSON too, are relative to `folder`.

        Raises:
            ValueError: something that is not a recipe, an unknown key or an unknown pattern.
            TypeError: a value of the wrong type.
        """
        data = files.plain_data(data)
        if not isinstance(data, dict) or "attention" not in data:
            raise ValueError(f"a recipe must be a mapping with the key `attention`, got {shown(data)}")
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = [key for key in data if key not in known]
        if unknown:
            raise ValueError(f"unknown recipe key {shown(unknown[0])}; the keys are {', '.join(known)}")
        attention, kinds = data["attention"], _kinds()
        if isinstance(attention, dict) and "pattern" not in attention:
            attention = {selector: from_plain(p, kinds, folder) for selector, p in attention.items()}
        else:
            attention = from_plain(attention, kinds, folder)
        guidance = data.get("guidance")
        if isinstance(guidance, str):
            path = Path(folder) / guidance
            if not path.is_file():
                raise ValueError(f"`guidance` names {shown(guidance)}, and there is no file {path}")
            guidance = files.read(path)
        if guidance is not None:
            guidance = HeadPerturbation.from_dict(guidance)
        adapter = data.get("adapter")
        if isinstance(adapter, str):
            adapter = Adapter(adapter, folder)
        return cls(**{**data, "attention": attention, "guidance": guidance, "adapter": adapter})

    def to_yaml(self) -> str:
        """This recipe as YAML text."""
        from .yaml_text import to_yaml

        return to_yaml(self.to_dict())

    @classmethod
    def from_yaml(cls, text: str, folder: str | Path = ".") -> Recipe:
        """A recipe from YAML or JSON text; what it names is relative to `folder`.

        Raises:
            ValueError: text that is not YAML or JSON, has aliases, is longer or nested deeper than any recipe
                (`dit_accel.recipe.files`), or is not a recipe.
            TypeError: a value of the wrong type.
        """
        return cls.from_dict(files.parse(text), folder)

    def save(self, path: str | Path) -> None:
        """Write to a `.yaml`, `.yml` or `.json` file, whole or not at all."""
        path = Path(path)
        if path.suffix not in files.SUFFIXES:
            raise ValueError(f"a recipe file must end in {', '.join(files.SUFFIXES)}, got {path.name!r}")
        as_json = path.suffix == ".json"
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n" if as_json else self.to_yaml())

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a file written by `save` or by hand.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that is not a recipe.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no recipe file at {path}")
        data = files.read(Path(path))
        try:
            return cls.from_dict(data, Path(path).parent)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None


@cache
def _all_presets() -> dict[str, Recipe]:
    recipes = ((path.stem, Recipe.load(path)) for path in sorted(PRESETS.glob("*.yaml")))
    return {name: dataclasses.replace(recipe, name=name) for name, recipe in recipes}


def presets(family: str | None = None) -> dict[str, Recipe]:
    """The recipes that come with the library, by name; of one model family if given."""
    return {name: r for name, r in _all_presets().items() if family in (None, r.family)}


def resolve(recipe: Recipe | Pattern | str | Path) -> Recipe:
    """The recipe behind what `enable` takes: a recipe, a pattern, a preset's name or a file's path.

    Raises:
        ValueError: neither a preset nor a recipe file.
        TypeError: something else.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Pattern):
        return Recipe(recipe)
    if not isinstance(recipe, (str, Path)):
        raise TypeError(
            f"expected a Recipe, a preset's name or the path of a recipe file, got {shown(recipe)}"
        )
    if str(recipe) in presets():
        return presets()[str(recipe)]
    if Path(recipe).suffix in files.SUFFIXES:
        return Recipe.load(recipe)
    raise ValueError(
        f"{shown(str(recipe))} is neither a preset nor a recipe file (.yaml, .yml, .json); the presets are "
        f"{', '.join(presets())}"
    )


def _kinds() -> dict[str, type[Pattern]]:
    """The patterns that a file may name."""
    found = {name: getattr(patterns, name) for name in dir(patterns)}
    return {
        name: cls
        for name, cls in found.items()
        if isinstance(cls, type) and issubclass(cls, Pattern) and dataclasses.is_dataclass(cls)
    }


def _plain(value: Any) -> Any:
    """Of a field that is no pattern: tuples as lists, all the way down."""
    if isinstance(value, NoiseRange):
        return value.to_dict()
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def _slug(pattern: Pattern) -> str:
    """The pattern's name and its numbers: `"neighborhood-5x9x9"`."""
    values = [
        v
        for k, v in to_plain(pattern, files=False).items()
        if k != "pattern" and not isinstance(v, (bool, dict))
    ]
    values = [v for v in values if not (isinstance(v, list) and any(isinstance(x, list) for x in v))]
    words = ["x".join(map(str, v)) if isinstance(v, list) else str(v) for v in values]
    return "-".join([type(pattern).__name__.lower(), *words])
