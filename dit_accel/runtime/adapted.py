"""An adapter's LoRA in the linear layers of a transformer, for as long as its recipe is enabled.

A layer becomes one of a subclass of its class whose call adds the LoRA's output. It stays the same module
with the same parameters: what is saved, moved, quantized, offloaded or compiled, and LoRA of the user's own
that PEFT puts around it, is as without. Compiled code asks for a module's class, and is compiled again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dit_accel.errors import UnavailableError
from dit_accel.recipe.adapter import Part

_PLACE = "_dit_accel_lora"


@dataclass(eq=False)
class Lora:
    """``scale * B (A x)`` of a linear layer: A (rank, in), B (out, rank)."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    _cast: tuple[torch.Tensor, torch.Tensor] | None = None  # a and b as the latest call needed them

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out), in the dtype and on the device of x."""
        a, b = self.a, self.b
        if torch.compiler.is_compiling():
            a, b = (w.to(x.device, x.dtype) for w in (a, b))
        elif (a.device, a.dtype) != (x.device, x.dtype) and not a.requires_grad:
            a, b = self._cast or (a, b)
            if (a.device, a.dtype) != (x.device, x.dtype):
                with torch.inference_mode(False):  # what stays must be usable under autograd later
                    self._cast = a, b = self.a.to(x.device, x.dtype), self.b.to(x.device, x.dtype)
        return F.linear(F.linear(x, a), b) * self.scale


class Adapted:
    """LoRA of one transformer, checked against its layers. Nothing is changed before `attach`.

    Args:
        transformer: any, on any device; the meta device is enough to check.
        part: the LoRA.
        file: what the adapter is called.

    Raises:
        ValueError: layers that the transformer does not have, or that have other sizes.
        UnavailableError: layers that are no linear layers, or fused ones.
    """

    def __init__(self, transformer: nn.Module, part: Part, file: str):
        self.part, self.file = part, file
        self._loras: dict[str, Lora] | None = None  # as they are read, so that files may go meanwhile
        self._places: list[tuple[nn.Module, str]] = []  # of each layer, the module that holds it, and where
        self.modules: dict[str, nn.Module] = {}
        for name, own in part.layers.items():
            parent, _, last = name.rpartition(".")
            try:
                holder = transformer.get_submodule(parent)
                module = _inmost(holder._modules[last])
            except (AttributeError, KeyError):
                raise ValueError(
                    f"adapter {file} has LoRA of {name}, which this {type(transformer).__name__} does not "
                    "have: it was made for another model"
                ) from None
            sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
            if None in sizes:
                raise UnavailableError(
                    f"adapter {file}: {name} of this model is a {type(module).__name__}, and LoRA is of "
                    "linear layers; enable before what replaced it, or use a model with linear layers there"
                )
            if sizes != (own.inputs, own.outputs):
                raise ValueError(
                    f"adapter {file}: {name} has {own.inputs} inputs and {own.outputs} outputs there, and "
                    f"{sizes[0]} and {sizes[1]} in this model: it was made for another model"
                )
            self._places.append((holder, last))
            self.modules[name] = module
        self._holders = list(dict.fromkeys(holder for holder, _ in self._places))
        self._check_fused()

    def describe(self) -> str:
        """In a line."""
        return f"adapter {self.file}: LoRA of rank {self.part.ranks} in {len(self.modules)} linear layers"

    def attach(self, tensors: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None) -> None:
        """Put the LoRA into its layers: that of the file, or other A and B, such as those that are trained.

        Raises:
            ValueError: a file that has changed, or is not finite.
        """
        if tensors is not None or self._loras is None:
            tensors = tensors or self.part.tensors()
            layers = self.part.layers
            self._loras = {name: Lora(*pair, layers[name].scale) for name, pair in tensors.items()}
        for name, module in self.modules.items():
            module.__dict__[_PLACE] = self._loras[name]
            module.__class__ = _adapted(type(module))

    def detach(self) -> None:
        """Make the layers what they were, bit for bit."""
        for module in self.modules.values():
            if module.__dict__.pop(_PLACE, None) is not None:
                module.__class__ = type(module).__mro__[1]

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
def _adapted(kind: type[nn.Module]) -> type[nn.Module]:
    def call(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = kind.__call__(self, x, *args, **kwargs)  # with whatever hooks and offloading do
        return out + self._dit_accel_lora(x)

    def reduce(self: Any, protocol: int) -> tuple:
        return _new, (kind,), self.__dict__

    body = {"__call__": call, "__reduce_ex__": reduce, "__module__": __name__}
    return type(f"Adapted{kind.__name__}", (kind,), body)


def _new(kind: type[nn.Module]) -> nn.Module:
    """For copies and pickles."""
    made = _adapted(kind)
    return made.__new__(made)
