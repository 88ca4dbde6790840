"""A guard against black pictures: raises where a run's prediction turns NaN or infinite, naming the layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dit_accel.attention import transformer_call
from dit_accel.attention.transformer_call import TransformerCall
from dit_accel.errors import NonFiniteError


@dataclass(eq=False)
class Guarded:
    """A prediction that is being looked at.

    Attributes:
        finite: whether all of it is, a bool tensor on the CPU that the device may still have to fill.
        ready: says when it has; None: it is.
        step, total: the sampler step of the call, and how many there are (None: not known).
        again: runs the forward of the call once more.
    """

    finite: torch.Tensor
    ready: torch.cuda.Event | None
    step: int
    total: int | None
    again: Callable[[], Any]


class RunGuard:
    """Looks at the predictions of one transformer, each at the next call or at once where none will come.

    Args:
        transformer: whose calls they are.
        layers: its attention layers, by name.
        name: the pipeline's for the transformer.
    """

    def __init__(self, transformer: nn.Module, layers: Mapping[str, nn.Module], name: str):
        self.transformer, self.layers, self.name = transformer, layers, name

    def look(self, call: TransformerCall, inputs: dict[str, Any], sample: torch.Tensor) -> None:
        """Looks at a call's prediction; a GPU's answer is kept in the run's record for `check`.

        Raises:
            NonFiniteError: see `check` of this module.
        """

        def again() -> Any:
            with transformer_call.within(call):
                return self.transformer.forward(**inputs)

        watched = watch(sample, call.step, call.record.steps, again)
        if watched is not None and is_last(watched):
            check(watched, self._named_modules)
        elif watched is not None:
            call.record.guarded[self.name] = watched

    def check(self, guarded: dict[str, Guarded]) -> None:
        """Raises NonFiniteError if the latest prediction among those of a run was not finite."""
        watched = guarded.pop(self.name, None)
        if watched is not None:
            check(watched, self._named_modules)

    def _named_modules(self) -> dict[str, nn.Module]:
        """Attention layers, and all modules that are not part of one."""
        inside = {id(part) for layer in self.layers.values() for part in layer.modules()}
        others = {
            f"module {name}": module
            for name, module in self.transformer.named_modules()
            if name and id(module) not in inside
        }
        return {f"attention layer {name}": module for name, module in self.layers.items()} | others


def watch(sample: torch.Tensor, step: int, total: int | None, again: Callable[[], Any]) -> Guarded | None:
    """Asks whether a prediction is finite, without waiting for a GPU; None where it holds no values."""
    if sample.device.type == "meta":
        return None
    finite = torch.isfinite(sample.detach()).all()
    if sample.device.type != "cuda":
        return Guarded(finite.cpu(), None, step, total, again)
    if torch.cuda.is_current_stream_capturing():
        return None
    answer = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
    answer.copy_(finite, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return Guarded(answer, ready, step, total, again)


def is_last(guarded: Guarded) -> bool:
    """Whether no call of the run comes after its step, as far as is known."""
    return guarded.ready is None or (guarded.total is not None and guarded.step == guarded.total - 1)


def check(guarded: Guarded, named: Callable[[], dict[str, nn.Module]]) -> None:
    """Raises if the prediction is not finite.

    Args:
        guarded: from `watch`.
        named: gives the modules worth naming, by what they are called in the message.

    Raises:
        NonFiniteError: naming the step, the layer where it began and what to do.
    """
    if guarded.ready is not None:
        guarded.ready.synchronize()
    if bool(guarded.finite):
        return
    of_total = "" if guarded.total is None else f" of {guarded.total}"
    raise NonFiniteError(
        f"the prediction of sampler step {guarded.step}{of_total} holds NaN or infinity, so that the result "
        f"would be black; {_began(guarded, named())}. Keep that layer dense by `dense_layers`, choose "
        "another dtype (bfloat16 or float32 instead of float16), or go on regardless by `Recipe(guard=False)`"
    )


def _began(guarded: Guarded, named: dict[str, nn.Module]) -> str:
    """Where it began, by running the call once more and looking at what goes in and out of modules."""
    found: list[str] = []

    def look(name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if found or _all_finite(output):
            return
        ins = _all_finite((args, kwargs))
        found.append(f"it began in {name}" if ins else f"what {name} was given was not finite already")

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name, module in named.items():
            hooks.enter_context(_hook(name, module, look))
        guarded.again()
    return found[0] if found else "it began after the last block, or in the perturbed branch of guidance"


@contextlib.contextmanager
def _hook(name: str, module: nn.Module, look: Callable) -> Iterator[None]:
    handle = module.register_forward_hook(
        lambda module, args, kwargs, output: look(name, module, args, kwargs, output), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


def _all_finite(values: Any) -> bool:
    if isinstance(values, torch.Tensor):
        return not values.is_floating_point() or bool(torch.isfinite(values).all())
    if isinstance(values, dict):
        return all(map(_all_finite, values.values()))
    if isinstance(values, (tuple, list)):
        return all(map(_all_finite, values))
    return True
