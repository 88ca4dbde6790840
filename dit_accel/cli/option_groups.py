"""Groups of options that several commands take: dataclasses whose fields typer shows as options of each."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from . import options as opt
from . import results as res
from .output import JsonOption

if TYPE_CHECKING:
    from dit_accel.evals.metrics.folders import Store
    from dit_accel.scorers.pretrained import Sources


@dataclass(frozen=True, kw_only=True)
class Judging:
    """What evaluates files and where, and what becomes of the result."""

    device: opt.DeviceOption = "auto"
    weights: res.WeightsOption = None
    allow_download: res.DownloadOption = False
    allow_skipped: res.SkippedOption = False
    cache: res.CacheOption = None
    no_cache: res.NoCacheOption = False
    label: res.LabelOption = None
    out: res.OutOption = None
    json: JsonOption = False

    def __post_init__(self) -> None:
        if self.out is not None:
            opt.check_output(self.out)

    def sources(self) -> Sources:
        """Where weights may come from; see `results.pick_sources`."""
        return res.pick_sources(self.weights, self.allow_download)

    def store(self) -> Store:
        """Where finished parts are kept; see `results.pick_store`."""
        return res.pick_store(self.cache, self.no_cache)

    def give(self, kind: str, answer: dict[str, Any]) -> None:
        """Writes and prints a result; see `results.head` and `results.give`."""
        res.give({**res.head(kind, self.label), **answer}, self.out, self.json)


def grouped(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a command that takes groups: their fields become its options, in their place."""
    groups, parameters = {}, []
    for name, parameter in inspect.signature(command).parameters.items():
        kind = get_type_hints(command, include_extras=True)[name]
        if not is_dataclass(kind):
            parameters.append(parameter.replace(annotation=kind, kind=parameter.KEYWORD_ONLY))
            continue
        groups[name] = [field.name for field in fields(kind)], kind
        hints = get_type_hints(kind, include_extras=True)
        for field in fields(kind):
            option = {"default": field.default, "annotation": hints[field.name]}
            parameters.append(inspect.Parameter(field.name, parameter.KEYWORD_ONLY, **option))

    @functools.wraps(command)
    def call(**values: Any) -> Any:
        for name, (names, kind) in groups.items():
            values[name] = kind(**{field: values.pop(field) for field in names})
        return command(**values)

    call.__signature__ = inspect.Signature(parameters)
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del call.__wrapped__
    return call
