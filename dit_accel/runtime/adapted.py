"""An adapter in the linear layers of a transformer, for as long as its recipe is enabled.

A layer becomes one of a subclass of its class: with LoRA one whose call adds the LoRA's output, with whole
weights one that computes with these. It stays the same module with the same parameters: what is saved, moved,
quantized, offloaded or compiled, and LoRA of the user's own that PEFT puts around it, is as without. Compiled
code asks for a module's class, and is compiled again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dit_accel.errors import UnavailableError
from dit_accel.recipe.adapter_parts import Part, Whole, noun

_LORA, _OWN = "_dit_accel_lora", "_dit_accel_weights"


@dataclass(eq=False)
class _Tensors:
    """Some tensors as the calls need them.

    Attributes:
        tensors: as given; gradients reach those that require them.
    """

    tensors: tuple[torch.Tensor, ...]
    _cast: tuple[torch.Tensor, ...] | None = None  # as the latest call needed them

    def like(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """In the dtype and on the device of x."""
        if torch.compiler.is_compiling() or any(w.requires_grad for w in self.tensors):
            return tuple(w.to(x.device, x.dtype) for w in self.tensors)
        found = self._cast or self.tensors
        if any((w.device, w.dtype) != (x.device, x.dtype) for w in found):
            with torch.inference_mode(False):  # what stays must be usable under autograd later
                found = self._cast = tuple(w.to(x.device, x.dtype) for w in self.tensors)
        return found


@dataclass(eq=False)
class Lora(_Tensors):
    """``scale * B (A x)`` of a linear layer: A (rank, in), B (out, rank)."""

    scale: float = 1.0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out), in the dtype and on the device of x."""
        a, b = self.like(x)
        return F.linear(F.linear(x, a), b) * self.scale


@dataclass(eq=False)
class Own(_Tensors):
    """``W x + b`` of a linear layer: W (out, in) and, where there is one, b (out,)."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out), in the dtype and on the device of x."""
        return F.linear(x, *self.like(x))


class Adapted:
    """An adapter's part for one transformer, checked against its layers. Nothing is changed before `attach`.

    Args:
        transformer: any, on any device; the meta device is enough to check.
        part: the LoRA or whole weights.
        file: what the adapter is called.

    Attributes:
        modules: the linear layers by name.
        learned: while it is attached, learned weights by the name of an attention module and their own.

    Raises:
        ValueError: layers that the transformer does not have, or that have other sizes.
        UnavailableError: layers that are no linear layers, or fused ones.
    """

    def __init__(self, transformer: nn.Module, part: Part, file: str):
        self.part, self.file = part, file
        self.learned: dict[str, dict[str, torch.Tensor]] = {}
        # as they are read, so that files may go meanwhile
        self._own: dict[str, Lora | Own] | None = None
        self._learned: dict[str, dict[str, torch.Tensor]] | None = None
        self._moved: dict[str, dict[str, torch.Tensor]] = {}  # these on the device of the latest call
        self._places: list[tuple[nn.Module, str]] = []  # of each layer, the module that holds it, and where
        self.modules: dict[str, nn.Module] = {}
        for name, own in part.layers.items():
            parent, _, last = name.rpartition(".")
            try:
                holder = transformer.get_submodule(parent)
                module = _inmost(holder._modules[last])
            except (AttributeError, KeyError):
                raise ValueError(
                    f"adapter {file} has {self.kind} of {name}, which this {type(transformer).__name__} does "
                    "not have: it was made for another model"
                ) from None
            sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
            if None in sizes:
                raise UnavailableError(
                    f"adapter {file}: {name} of this model is a {type(module).__name__}, and {self.kind} is "
                    "for linear layers; enable before what replaced it, or use a model with linear layers "
                    "there"
                )
            if sizes != (own.inputs, own.outputs):
                raise ValueError(
                    f"adapter {file}: {name} has {own.inputs} inputs and {own.outputs} outputs there, and "
                    f"{sizes[0]} and {sizes[1]} in this model: it was made for another model"
                )
            if isinstance(own, Whole):
                self._check_whole(name, module, own)
            self._places.append((holder, last))
            self.modules[name] = module
        for name, own in part.learned.items():
            try:
                transformer.get_submodule(name)
            except AttributeError:
                raise ValueError(
                    f"adapter {file} has {noun(next(iter(own)))} of {name}, which this "
                    f"{type(transformer).__name__} does not have: it was made for another model"
                ) from None
        names = (
            {name.replace(".base_layer.", ".") for name in transformer.state_dict()} if part.others else set()
        )
        unknown = next((name for name in part.others if name not in names), None)
        if unknown is not None:
            raise ValueError(
                f"adapter {file} has the weight {unknown}, which this {type(transformer).__name__} does not "
                "have and no pattern learns: it is of another model"
            )
        self._holders = list(dict.fromkeys(holder for holder, _ in self._places))
        self._check_fused()

    def describe(self) -> str:
        """In a line."""
        return f"adapter {self.file}: {self.part.describe()}"

    @property
    def kind(self) -> str:
        """What it has of a layer, in a word or two."""
        return "a weight" if self.part.whole else "LoRA"

    def attach(
        self,
        tensors: Mapping[str, tuple[torch.Tensor, ...]] | None = None,
        learned: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    ) -> None:
        """Put it into its layers: what the file has, or other tensors, such as those that are trained.

        Raises:
            ValueError: a file that has changed, or is not finite.
        """
        if tensors is not None or self._own is None:
            self._moved = {}
            given = self.part.learned_weights() if learned is None else learned
            self._learned = {module: dict(own) for module, own in given.items()}
            tensors = self.part.tensors() if tensors is None else tensors
            layers = self.part.layers.items()
            self._own = {
                name: Own(tensors[name]) if isinstance(own, Whole) else Lora(tensors[name], scale=own.scale)
                for name, own in layers
            }
        self.learned = self._learned or {}
        for name, module in self.modules.items():
            own = self._own[name]
            module.__dict__[_OWN if isinstance(own, Own) else _LORA] = own
            module.__class__ = _adapted(type(module), isinstance(own, Own))

    def detach(self) -> None:
        """Make the layers what they were, bit for bit."""
        self.learned = {}
        for module in self.modules.values():
            found = [module.__dict__.pop(place, None) for place in (_LORA, _OWN)]
            if any(own is not None for own in found):
                module.__class__ = type(module).__mro__[1]

    def learned_on(self, device: torch.device) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """`learned` on a device; moved once."""
        if all(x.device == device for own in self.learned.values() for x in own.values()):
            return self.learned
        moved = [x for own in self._moved.values() for x in own.values()]
        if not moved or any(x.device != device for x in moved):
            with torch.inference_mode(False):  # what stays must be usable under autograd later
                self._moved = {
                    module: {name: x.to(device) for name, x in own.items()}
                    for module, own in self.learned.items()
                }
        return self._moved

    def _check_whole(self, name: str, module: nn.Module, own: Whole) -> None:
        if own.bias != (getattr(module, "bias", None) is not None):
            there = ("no bias", "a bias")
            raise ValueError(
                f"adapter {self.file}: {name} has {there[own.bias]} there, and {there[not own.bias]} in this "
                "model: it was made for another model"
            )
        if "forward" in vars(module):
            raise UnavailableError(
                f"adapter {self.file} has whole weights of {name}, whose `forward` something has replaced, "
                "as offloading by layers does; enable first and offload after that, or offload whole models"
            )

    def check(self) -> None:
        """Raises where something has taken the layers out since they were attached."""
        self._check_fused()
        for (holder, last), (name, module) in zip(self._places, self.modules.items(), strict=True):
            if _inmost(holder._modules[last]) is not module:
                raise RuntimeError(
                    f"{name}, in which adapter {self.file} acts, was replaced while dit-accel was enabled; "
                    "call `dit_accel.disable` before replacing it and enable again"
                )

    def _check_fused(self) -> None:
        fused = next(
            (holder for holder in self._holders if getattr(holder, "fused_projections", False)), None
        )
        if fused is not None:
            raise UnavailableError(
                f"adapter {self.file} acts in the projections of {type(fused).__name__}, which are fused "
                "into one; call `unfuse_qkv_projections()`, or use the recipe without `adapter`"
            )


def _inmost(module: nn.Module) -> nn.Module:
    """A layer out of PEFT's wrappers."""
    while (base := module._modules.get("base_layer")) is not None:
        module = base
    return module


@cache
def _adapted(kind: type[nn.Module], whole: bool) -> type[nn.Module]:
    def call(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = kind.__call__(self, x, *args, **kwargs)  # with whatever hooks and offloading do
        return out + self._dit_accel_lora(x)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        own = vars(self).get(_OWN)  # None: offloading has kept this function from when it was adapted
        return kind.forward(self, x) if own is None else own(x)

    def reduce(self: Any, protocol: int) -> tuple:
        return _new, (kind, whole), self.__dict__

    body = {"forward": forward} if whole else {"__call__": call}
    body |= {"__reduce_ex__": reduce, "__module__": __name__}
    return type(f"Adapted{kind.__name__}", (kind,), body)


def _new(kind: type[nn.Module], whole: bool) -> nn.Module:
    """For copies and pickles."""
    made = _adapted(kind, whole)
    return made.__new__(made)
