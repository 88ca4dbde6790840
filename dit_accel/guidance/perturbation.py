"""Which attention heads the perturbed branch weakens, how, and how strongly guidance steers away from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

from .. import selectors

KINDS = ("soft_pag", "pag", "uniform", "seg", "temperature")
TOKENS = ("all", "image")
MODULES = ("attn", "attn2", "both")

Head = tuple[int, int]


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
                raise ValueError(f"`{name}` must be one of {options}, got {getattr(self, name)!r}")
        object.__setattr__(self, "heads", _heads(self.heads))
        if not callable(self.strength):
            check_strength("strength", self.strength)
        _check_number("scale", self.scale)
        _check_number("sigma", self.sigma, positive=True)
        if self.temperature is not None:
            _check_number("temperature", self.temperature, positive=True)
        if (self.temperature is not None) != (self.kind == "temperature"):
            raise ValueError(
                f"`temperature` belongs to kind='temperature', which needs it; got {self.temperature!r} with "
                f"kind={self.kind!r}"
            )
        for name in ("start", "stop"):
            _check_number(name, getattr(self, name))
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
        indices = selectors.flat_indices(names)
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
        if not (callable(self.strength) if alone else self.needs_total):
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

    @contextmanager
    def applied(self, target: Any) -> Iterator[None]:
        """Run a transformer (or a pipeline's) as the perturbed model alone, for the length of a `with` block.

        What was enabled stays in force under it and afterwards. `scale`, `start` and `stop` play no part.

        Raises:
            ValueError, UnavailableError, TypeError: see `dit_accel.enable`.
        """
        from ..patterns import Dense
        from ..recipe import Recipe
        from ..switch import accelerated, handle_of

        before = handle_of(target)
        recipe = Recipe(Dense()) if before is None else before.recipe
        with accelerated(target, replace(recipe, guidance=self)) as handle:
            for binding in handle.bindings.values():
                binding.branch.alone = True
                for earlier in () if before is None else before.bindings.values():
                    if earlier.transformer is binding.transformer:
                        binding.adopt(earlier)
            yield

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
            raise ValueError(f"`guidance` must be a mapping with a list under `heads`, got {data!r}")
        known = [f.name for f in fields(cls)]
        unknown = [key for key in data if key not in known]
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r} of `guidance`; the keys are {', '.join(known)}")
        heads = [tuple(entry) if isinstance(entry, list) else entry for entry in data["heads"]]
        weighted = [isinstance(entry, tuple) and len(entry) == 3 for entry in heads]
        if any(weighted) and not all(weighted):
            raise ValueError("`heads` must have a strength in every entry or in none")
        if any(weighted):
            heads = {layer if head is None else (layer, head): weight for layer, head, weight in heads}
        return cls(**{**data, "heads": heads})


def check_strength(name: str, value: Any) -> float:
    """`value`, if it is a number from 0 to 1.

    Raises:
        ValueError, TypeError: it is not.
    """
    _check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"`{name}` must be from 0 to 1, got {value!r}")
    return value


def _check_number(name: str, value: Any, positive: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, got {value!r}")
    if not math.isfinite(value) or (positive and value <= 0):
        raise ValueError(f"`{name}` must be a {'positive' if positive else 'finite'} number, got {value!r}")


def _heads(heads: Any) -> tuple[Head | int, ...] | dict[Head | int, float]:
    """The heads in order, without repeats."""
    if isinstance(heads, (str, bytes)) or not isinstance(heads, Iterable):
        raise TypeError(f"`heads` must be a list of (layer, head) pairs or a mapping, got {heads!r}")
    entries = {tuple(entry) if isinstance(entry, list) else entry: entry for entry in heads}
    for entry in entries:
        numbers = (entry,) if isinstance(entry, int) else entry
        if (
            not isinstance(numbers, tuple)
            or (len(numbers) != 2 and not isinstance(entry, int))
            or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers)
        ):
            raise ValueError(
                f"`heads` must hold (layer, head) pairs or layers, as numbers from 0, got {entry!r}"
            )
    if not entries:
        raise ValueError("`heads` is empty; name at least one (layer, head), or leave guidance out")
    ordered = sorted(entries, key=lambda entry: (_pair(entry)[0], -1 if isinstance(entry, int) else entry[1]))
    if not isinstance(heads, Mapping):
        return tuple(ordered)
    return {entry: check_strength(f"heads[{entry!r}]", heads[entry]) for entry in ordered}


def _pair(entry: Head | int) -> tuple[int, int | None]:
    return (entry, None) if isinstance(entry, int) else entry
