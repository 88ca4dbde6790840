"""Recipes: which pattern, where (layers, heads, steps), in which format."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from . import patterns
from .blockmask import check_block_size
from .guidance import HeadPerturbation
from .patterns import Pattern

PRESETS = Path(__file__).parent / "recipes"
_ORDERS = ("auto", "raster", "tile", "hilbert")
_SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class Recipe:
    """What to accelerate and how. See `dit_accel.enable`.

    Args:
        attention: one pattern for every layer, or a mapping from layer selector (see `dit_accel.selectors`)
            to pattern, later entries overriding earlier ones. What no selector names keeps the model's own
            attention.
        dense_layers: layers that keep the model's own attention: an int for the first n, or a set of flat
            indices, negative ones counting from the end.
        dense_steps: sampler steps at which all layers do, in the same two forms, or a float: the first
            fraction of the steps, rounded up.
        quantization: reserved; must be None in this version.
        guidance: a `HeadPerturbation` of `dit_accel.guidance`, or None.
        backend: kernel of `dit_accel.kernels.block_sparse_attention`.
        block_size: (query, key) block sizes; None takes the default of the device.
        order: token order, see `Pattern.block_mask`.
        min_tokens: layers that attend to fewer tokens keep the model's own attention: a number, or `"auto"`
            for the length from which sparse attention was measured to be faster on the device, at the layer's
            density (`dit_accel.rates.Rates.break_even`).
        family: the model family this recipe is for, or None for any.
        name, source: what it is called and where its numbers come from; not compared.

    Raises:
        ValueError, TypeError: a value outside these forms.
    """

    attention: Pattern | Mapping[str, Pattern]
    dense_layers: int | Iterable[int] = 0
    dense_steps: int | float | Iterable[int] = 0
    quantization: str | None = None
    guidance: HeadPerturbation | None = None
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
                f"patterns, got {self.attention!r}"
            )
        object.__setattr__(self, "dense_layers", _index_spec("dense_layers", self.dense_layers))
        object.__setattr__(self, "dense_steps", _index_spec("dense_steps", self.dense_steps, fraction=True))
        if self.block_size is not None:
            check_block_size(self.block_size)
            object.__setattr__(self, "block_size", tuple(self.block_size))
        if self.guidance is not None and not isinstance(self.guidance, HeadPerturbation):
            raise TypeError(
                "`guidance` must be a `HeadPerturbation` of `dit_accel.guidance` or None, got "
                f"{self.guidance!r}"
            )
        if self.order not in _ORDERS:
            raise ValueError(f"`order` must be one of {', '.join(map(repr, _ORDERS))}, got {self.order!r}")
        if self.min_tokens != "auto" and (type(self.min_tokens) is not int or self.min_tokens < 0):
            raise ValueError(
                f"`min_tokens` must be a whole number of tokens from 0 or 'auto', got {self.min_tokens!r}"
            )
        for name in ("backend", "name", "source"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"`{name}` must be text, got {getattr(self, name)!r}")

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
        plain = dataclasses.replace(self, guidance=None, name="", source="").to_dict()
        if isinstance(self.attention, dict):
            plain["attention"] = list(map(list, plain["attention"].items()))
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
            label += f"+{self.guidance.kind}" if self.guidance else ""
        digest = hashlib.sha1(json.dumps(self.content, sort_keys=True).encode()).hexdigest()
        return f"{re.sub(r'[^A-Za-z0-9.+-]+', '-', label)[:48]}-{digest[:6]}"

    def dense_layer_indices(self, layers: int) -> frozenset[int]:
        """Flat indices of the dense layers of a model with `layers` layers.

        Raises:
            ValueError: an index that this model does not have.
        """
        if isinstance(self.dense_layers, int):
            if self.dense_layers > layers:
                raise ValueError(
                    f"`dense_layers` is {self.dense_layers}, but this model has {layers} attention layers"
                )
            return frozenset(range(self.dense_layers))
        missing = [i for i in self.dense_layers if not -layers <= i < layers]
        if missing:
            raise ValueError(f"`dense_layers` names {missing}, but this model has {layers} attention layers")
        return frozenset(i % layers for i in self.dense_layers)

    @property
    def needs_total(self) -> bool:
        """Whether the dense steps depend on how many steps a run has."""
        return isinstance(self.dense_steps, float) or (
            isinstance(self.dense_steps, tuple) and any(i < 0 for i in self.dense_steps)
        )

    def is_dense_step(self, step: int, total: int | None) -> bool:
        """Whether sampler step `step` of `total` (None: not known) is dense.

        Raises:
            ValueError: the answer depends on a total that is not known.
        """
        if self.needs_total and total is None:
            raise ValueError(
                f"`dense_steps={self.dense_steps!r}` needs the number of steps, which a bare transformer "
                "does not know; call `handle.begin(steps)` before the run, or enable on the pipeline"
            )
        if isinstance(self.dense_steps, float):
            return step < math.ceil(self.dense_steps * total - 1e-9)
        if isinstance(self.dense_steps, int):
            return step < self.dense_steps
        return step in self.dense_steps or (total is not None and step - total in self.dense_steps)

    # -- files ---------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data for YAML or JSON; fields at their defaults are left out.

        Raises:
            ValueError: a `guidance` with a schedule, which has no plain form.
        """
        order = ("name", "family", "source", "attention")
        fields = sorted(
            dataclasses.fields(self), key=lambda f: order.index(f.name) if f.name in order else len(order)
        )
        data = {f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) != f.default}
        if isinstance(self.attention, dict):
            data["attention"] = {selector: _pattern_to_dict(p) for selector, p in self.attention.items()}
        else:
            data["attention"] = _pattern_to_dict(self.attention)
        if self.guidance is not None:
            data["guidance"] = self.guidance.to_dict()
        return {key: _plain(value) for key, value in data.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], folder: str | Path = ".") -> Recipe:
        """The inverse of `to_dict`; `guidance` may also name a JSON file, relative to `folder`.

        Raises:
            ValueError: something that is not a recipe, an unknown key or an unknown pattern.
        """
        if not isinstance(data, Mapping) or "attention" not in data:
            raise ValueError(f"a recipe must be a mapping with the key `attention`, got {data!r}")
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = [key for key in data if key not in known]
        if unknown:
            raise ValueError(f"unknown recipe key {unknown[0]!r}; the keys are {', '.join(known)}")
        attention = data["attention"]
        if isinstance(attention, Mapping) and "pattern" not in attention:
            attention = {str(selector): _pattern_from_dict(p) for selector, p in attention.items()}
        else:
            attention = _pattern_from_dict(attention)
        guidance = data.get("guidance")
        if isinstance(guidance, str):
            guidance = _read_json(Path(folder) / guidance)
        if guidance is not None:
            guidance = HeadPerturbation.from_dict(guidance)
        return cls(**{**data, "attention": attention, "guidance": guidance})

    def to_yaml(self) -> str:
        """This recipe as YAML text."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=110)

    @classmethod
    def from_yaml(cls, text: str, folder: str | Path = ".") -> Recipe:
        """A recipe from YAML or JSON text; what it names is relative to `folder`.

        Raises:
            ValueError: text that is not YAML, or not a recipe.
        """
        import yaml

        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"a recipe must be YAML or JSON: {error}") from None
        return cls.from_dict(data, folder)

    def save(self, path: str | Path) -> None:
        """Write to a `.yaml`, `.yml` or `.json` file."""
        path = Path(path)
        if path.suffix not in _SUFFIXES:
            raise ValueError(f"a recipe file must end in {', '.join(_SUFFIXES)}, got {path.name!r}")
        path.write_text(
            json.dumps(self.to_dict(), indent=2) + "\n" if path.suffix == ".json" else self.to_yaml()
        )

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a file written by `save` or by hand.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that is not a recipe.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no recipe file at {path}")
        try:
            return cls.from_yaml(Path(path).read_text(), Path(path).parent)
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
        raise TypeError(f"expected a Recipe, a preset's name or the path of a recipe file, got {recipe!r}")
    if str(recipe) in presets():
        return presets()[str(recipe)]
    if Path(recipe).suffix in _SUFFIXES:
        return Recipe.load(recipe)
    raise ValueError(
        f"{str(recipe)!r} is neither a preset nor a recipe file (.yaml, .yml, .json); the presets are "
        f"{', '.join(presets())}"
    )


def _index_spec(name: str, value, fraction: bool = False):
    """A validated int, float or sorted tuple of ints."""
    forms = "an int (the first n)" + (", a float from 0 to 1 (the first fraction)" if fraction else "")
    forms += " or a set of indices"
    if isinstance(value, bool) or (isinstance(value, int) and value < 0):
        raise ValueError(
            f"`{name}` must be {forms}, got {value!r}" + ("; for the last n use {-1, ...}" if value else "")
        )
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        if fraction and 0 <= value <= 1:
            return value
        raise ValueError(f"`{name}` must be {forms}, got {value!r}")
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"`{name}` must be {forms}, got {value!r}")
    indices = list(value)
    if any(isinstance(i, bool) or not isinstance(i, int) for i in indices):
        raise TypeError(f"`{name}` must be {forms}, got {value!r}")
    return tuple(sorted(set(indices)))


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"`guidance` names {path}, and there is no such file")
    return json.loads(path.read_text())


def _pattern_to_dict(pattern: Pattern) -> dict[str, Any]:
    values = {f.name: getattr(pattern, f.name) for f in dataclasses.fields(pattern)}
    defaults = {f.name: f.default for f in dataclasses.fields(pattern)}
    return {
        "pattern": type(pattern).__name__,
        **{k: _plain(v) for k, v in values.items() if v != defaults[k]},
    }


def _pattern_from_dict(data: Mapping[str, Any]) -> Pattern:
    if isinstance(data, str):
        data = {"pattern": data}
    if not isinstance(data, Mapping) or not isinstance(data.get("pattern"), str):
        raise ValueError(f"a pattern must be a mapping with the key `pattern`, got {data!r}")
    cls = getattr(patterns, data["pattern"], None)
    if not (isinstance(cls, type) and issubclass(cls, Pattern) and dataclasses.is_dataclass(cls)):
        known = [n for n in dir(patterns) if dataclasses.is_dataclass(getattr(patterns, n))]
        raise ValueError(f"unknown pattern {data['pattern']!r}; the patterns are {', '.join(known)}")
    try:
        return cls(**{key: _tuples(value) for key, value in data.items() if key != "pattern"})
    except TypeError as error:
        raise ValueError(f"pattern {data['pattern']}: {error}") from None


def _plain(value):
    """Tuples as lists, all the way down."""
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def _tuples(value):
    """Lists as tuples, all the way down."""
    return tuple(_tuples(v) for v in value) if isinstance(value, (tuple, list)) else value


def _slug(pattern: Pattern) -> str:
    """The pattern's name and its numbers: `"neighborhood-5x9x9"`."""
    values = [
        v for k, v in _pattern_to_dict(pattern).items() if k != "pattern" and not isinstance(v, (bool, dict))
    ]
    words = ["x".join(map(str, v)) if isinstance(v, list) else str(v) for v in values]
    return "-".join([type(pattern).__name__.lower(), *words])
