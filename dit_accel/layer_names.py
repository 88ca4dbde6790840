"""Names of attention layers, such as `double.3` or `blocks.0.attn2`: their parts, groups and numbers."""

from __future__ import annotations

from collections.abc import Sequence


def split_part(name: str) -> tuple[str, str]:
    """A layer's name without its part, and the part: `("blocks.3", "attn2")`."""
    group, number, *part = name.split(".")
    return f"{group}.{number}", ".".join(part)


def flat_indices(layers: Sequence[str]) -> list[int]:
    """The flat index of each layer; a part has that of its layer."""
    stems = [split_part(name)[0] for name in layers]
    flat = {stem: index for index, stem in enumerate(dict.fromkeys(stems))}
    return [flat[stem] for stem in stems]


def groups(layers: Sequence[str]) -> dict[str, list[int]]:
    """Flat indices of the layers of each group, in order: `{"double": [0, ...], "single": [19, ...]}`."""
    found: dict[str, dict[int, None]] = {}
    for index, name in zip(flat_indices(layers), layers, strict=True):
        found.setdefault(name.partition(".")[0], {})[index] = None
    return {group: list(members) for group, members in found.items()}
