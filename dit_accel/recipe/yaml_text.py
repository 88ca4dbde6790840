"""YAML to plain data and back, refusing what could grow, recurse or mean something else than it shows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import yaml

from dit_accel.arguments import shown

_Fastest: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Fastest):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise ValueError("it merges mappings (<<); write them out")
        found = super().construct_mapping(node, deep)
        if len(found) < len(keys):
            twice = next((key for key in keys if keys.count(key) > 1), keys[-1])
            raise ValueError(f"the key {shown(twice)} is there twice")
        return found


class _Dumper(yaml.SafeDumper):
    pass


for _kind in (_Loader, _Dumper):  # YAML 1.1 takes the numbers 1e-3 and 2E5 of JSON for text
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+"),
        list("-+.0123456789"),
    )


def from_yaml(text: str, deepest: int, most: int) -> Any:
    """The data of a YAML text of at most `most` values, nested at most `deepest` deep.

    Raises:
        ValueError: text that is no YAML, is larger or deeper, or has aliases, tags, merges or a key twice.
    """
    try:
        _check_events(yaml.parse(text, Loader=_Fastest), deepest, most)
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ValueError(f"a recipe must be YAML or JSON: {error!s:.500}") from None


def _check_events(events: Iterable[Any], deepest: int, most: int) -> None:
    """Refuses what could grow or recurse, before any of it is put together."""
    depth = values = 0
    for event in events:
        values += isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
        if values > 2 * most:  # keys are counted here
            raise ValueError(f"it holds more than {most} values")
        if getattr(event, "anchor", None) is not None:  # of an anchor and of its aliases
            raise ValueError(f"it has an anchor or alias, {shown(event.anchor)}; write the value out")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"it has a tag, {shown(event.tag)}; leave it out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > deepest:
            raise ValueError(f"it is nested more than {deepest} deep")


def to_yaml(data: dict[str, Any]) -> str:
    """Plain data as YAML that `from_yaml` gives back."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110)
