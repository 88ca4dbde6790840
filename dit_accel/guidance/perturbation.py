"""Which attention heads the perturbed branch weakens, how, and how strongly guidance steers away from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from dit_accel.arguments import is_integer, is_number, shown
from dit_accel.layer_names import flat_indices

KINDS = ("soft_pag", "pag", "uniform", "seg", "temperature")
TOKENS = ("all", "image")
MODULES = ("attn", "attn2", "both")

Head = tuple[int, int]
Apply = Callable[["HeadPerturbation", Any], AbstractContextManager[None]]

_apply: Apply


def applied_by(function: Apply) -> Apply:
    """Decorates what `HeadPerturbation.applied` calls, which stands above this configuration."""
    global _apply
    _apply = function
    return function


@dataclass(frozen=True)
class HeadPerturbation:
    """Perturbation guidance: cond + w (cond - ptb), with CFG uncond + g (cond - uncond) + w (cond - ptb).

    Give it as `Recipe(guidance=...)` to `dit_accel.enable`. A loop of your own with CFG around a bare
    transformer calls cond first and names its branches by `transformer.cache_context("cond")` and
    `("uncond")`; SD3's are the halves of a batch, [uncond, cond], with the same latents.

    `ptb` is the conditional prediction of the model with the output O of chosen heads replaced by
    O + u (O_kind - O). The kinds:

    - `"soft_pag"`: attention to oneself alone, so O_kind = V and no attention map is needed; with
      `tokens="image"`, image queries keep themselves and the text.
    - `"pag"`: the same at u = 1 over all heads of the layers that `heads` names.
    - `"uniform"`: the mean of V over all tokens.
    - `"seg"`: queries blurred on the (H, W) grid of their frame, with `tokens="all"` those of text along the
      text as well.
    - `"temperature"`: logits multiplied by `temperature`; 100000 acts as argmax.

    Args:
        heads: (layer, head) pairs, or a layer's number for all its heads; or a mapping from these to
            strengths, by which `strength` is multiplied. Layers are flat indices, double-stream blocks first.
        kind: see above.
        strength: u, from 0 to 1, or a function of the run's fraction done, from 0 to below 1.
        scale: w. 0 is no guidance, and no cost.
        tokens: `"all"`, or `"image"`: only queries of image tokens are perturbed.
        sigma: of `"seg"`, in tokens; above 9999 the mean.
        temperature: of `"temperature"`.
        modules: `"attn"`, or in SD3.5 the image-only `"attn2"` or `"both"`.
        start, stop: the fraction of the run in which it guides, `start <= step / steps < stop`.

    Raises:
        ValueError, TypeError: a value outside these forms.

    Source: HeadHunter and SoftPAG (arXiv 2506.10978), PAG (arXiv 2403.17377), SEG (arXiv 2408.00760).
    """

    heads: Iterable[Head | int] | Mapping[Head | int, float]
    kind: str = "soft_pag"
    strength: float | Callable[[float], float] = 1.0
    scale: float = 3.0
    tokens: str = "all"
    sigma: float = 100.0
    temperature: float | None = None
    modules: str = "attn"
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self):
        for name, known in (("kind", KINDS), ("tokens", TOKENS), ("modules", MODULES)):
            if getattr(self, name) not in known:
                options = ", ".join(map(repr, known))
                raise ValueError(f"`{name}` must be one of {options}, got {shown(getattr(self, name))}")
        object.__setattr__(self, "heads", _heads(self.heads))
        if not callable(self.strength):
            object.__setattr__(self, "strength", check_strength("strength", self.strength))
        for name in ("scale", "start", "stop"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        object.__setattr__(self, "sigma", _number("sigma", self.sigma, positive=True))
        if self.temperature is not None:
            object.__setattr__(self, "temperature", _number("temperature", self.temperature, positive=True))
        if (self.temperature is not None) != (self.kind == "temperature"):
            raise ValueError(
                "`temperature` belongs to kind='temperature', which needs it; got "
                f"{shown(self.temperature)} with kind={shown(self.kind)}"
            )
        if not 0 <= self.start <= self.stop <= 1:
            raise ValueError(f"0 <= start <= stop <= 1 must hold, got start={self.start}, stop={self.stop}")
        weights = self.heads.values() if isinstance(self.heads, dict) else ()
        if self.kind == "pag" and (self.strength != 1 or any(weight != 1 for weight in weights)):
            raise ValueError(
                "kind='pag' has strength 1 in all heads; for other strengths use kind='soft_pag'"
            )

    def layers(self, names: list[str], count: int) -> dict[str, dict[int, float]]:
        """The perturbed heads and their weights by layer, for a model's layer names with `count` heads each.

        Raises:
            ValueError: layers or heads that this model does not have.
        """
        weights = self.heads if isinstance(self.heads, dict) else dict.fromkeys(self.heads, 1.0)
        by_index: dict[int, dict[int, float]] = {}
        indices = flat_indices(names)
        for entry, weight in weights.items():
            layer, head = (entry, None) if isinstance(entry, int) else entry
            if layer not in indices:
                raise ValueError(
                    f"`heads` names layer {layer}, but this model has {max(indices) + 1} attention layers"
                )
            if head is not None and head >= count:
                raise ValueError(
                    f"`heads` names head {head}, but the layers of this model have {count} heads"
                )
            whole = head is None or self.kind == "pag"
            by_index.setdefault(layer, {}).update(dict.fromkeys(range(count) if whole else [head], weight))
        parts = {"attn": (False,), "attn2": (True,), "both": (False, True)}[self.modules]
        chosen = {
            name: dict(sorted(by_index[index].items()))
            for name, index in zip(names, indices, strict=True)
            if index in by_index and name.endswith(".attn2") in parts
        }
        for index in by_index:
            if not any(name in chosen for name, own in zip(names, indices, strict=True) if own == index):
                raise ValueError(
                    f'`modules` is "attn2", but layer {index} of this model has no `attn2`; use "attn"'
                )
        return chosen

    @property
    def needs_total(self) -> bool:
        """Whether what it does depends on how many steps a run has."""
        return callable(self.strength) or self.start > 0 or self.stop < 1

    def strength_at(self, step: int, total: int | None, alone: bool = False) -> float:
        """The strength u at a sampler step; 0 where it does not guide, unless it is to run alone.

        Raises:
            ValueError: the answer depends on a total that is not known, or a schedule that left 0 to 1.
        """
        if self.scale == 0 and not alone:
            return 0.0
        if not callable(self.strength) and (alone or not self.needs_total):
            return self.strength
        if total is None:
            raise ValueError(
                "`start`, `stop` and a schedule of `strength` need the number of steps, which a bare "
                "transformer does not know; call `handle.begin(steps)` before the run, or enable on the "
                "pipeline"
            )
        if not alone and not self.start * total - 1e-9 <= step < self.stop * total - 1e-9:
            return 0.0
        if not callable(self.strength):
            return self.strength
        return check_strength(f"strength({step / total:.3g})", self.strength(step / total))

    def applied(self, target: Any) -> AbstractContextManager[None]:
        """Run a transformer (or a pipeline's) as the perturbed model alone, for the length of a `with` block.

        What was enabled stays in force under it and afterwards. `scale`, `start` and `stop` play no part.

        Raises:
            ValueError, UnavailableError, TypeError: see `dit_accel.enable`.
        """
        return _apply(self, target)

    # -- files ---------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data for YAML or JSON; fields at their defaults are left out.

        Raises:
            ValueError: a `strength` that is a function, which has no plain form.
        """
        if callable(self.strength):
            raise ValueError("a `strength` that is a function cannot be written to a file; use a number")
        data = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        if isinstance(self.heads, dict):
            heads = [[*_pair(entry), weight] for entry, weight in self.heads.items()]
        else:
            heads = [entry if isinstance(entry, int) else list(entry) for entry in self.heads]
        return data | {"heads": heads}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HeadPerturbation:
        """The inverse of `to_dict`; heads are layers, [layer, head] or [layer, head or null, strength].

        Raises:
            ValueError: something else, or an unknown key.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("heads"), list):
            raise ValueError(f"`guidance` must be a mapping with a list under `heads`, got {shown(data)}")
        known = [f.name for f in fields(cls)]
        unknown = [key for key in data if key not in known]
        if unknown:
            raise ValueError(
                f"unknown key {shown(unknown[0])} of `guidance`; the keys are {', '.join(known)}"
            )
        heads = [tuple(entry) if isinstance(entry, list) else entry for entry in data["heads"]]
        weighted = [isinstance(entry, tuple) and len(entry) == 3 for entry in heads]
        if any(weighted) and not all(weighted):
            raise ValueError("`heads` must have a strength in every entry or in none")
        if any(weighted):
            weights = {
                _entry(layer if head is None else (layer, head)): weight for layer, head, weight in heads
            }
            if len(weights) < len(heads):
                raise ValueError("`heads` gives a head two strengths")
            heads = weights
        return cls(**{**data, "heads": heads})


def check_strength(name: str, value: Any) -> float:
    """`value`, if it is a number from 0 to 1.

    Raises:
        ValueError, TypeError: it is not.
    """
    number = _number(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"`{name}` must be from 0 to 1, got {shown(value)}")
    return number


def _number(name: str, value: Any, positive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number, got {shown(value)}")
    if not is_number(value) or (positive and value <= 0):
        raise ValueError(
            f"`{name}` must be a {'positive' if positive else 'finite'} number, got {shown(value)}"
        )
    return float(value)


def _heads(heads: Any) -> tuple[Head | int, ...] | dict[Head | int, float]:
    """The heads in order, without repeats."""
    if isinstance(heads, (str, bytes)) or not isinstance(heads, Iterable):
        raise TypeError(f"`heads` must be a list of (layer, head) pairs or a mapping, got {shown(heads)}")
    entries = {_entry(entry): entry for entry in heads}
    if not entries:
        raise ValueError("`heads` is empty; name at least one (layer, head), or leave guidance out")
    ordered = sorted(entries, key=lambda entry: (_pair(entry)[0], -1 if isinstance(entry, int) else entry[1]))
    if not isinstance(heads, Mapping):
        return tuple(ordered)
    return {entry: check_strength(f"heads[{shown(entry)}]", heads[entries[entry]]) for entry in ordered}


def _entry(entry: Any) -> Head | int:
    """A layer or a (layer, head) pair, in plain integers."""
    pair = isinstance(entry, (tuple, list)) and len(entry) == 2
    numbers = tuple(entry) if pair else (entry,)
    if not all(is_integer(n) and n >= 0 for n in numbers):
        raise ValueError(
            f"`heads` must hold (layer, head) pairs or layers, as numbers from 0, got {shown(entry)}"
        )
    return (int(entry[0]), int(entry[1])) if pair else int(entry)


def _pair(entry: Head | int) -> tuple[int, int | None]:
    return (entry, None) if isinstance(entry, int) else entry
