"""The registry of model families: which there are, and which one a transformer is of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .refused import why_refused

if TYPE_CHECKING:
    from .base import Family

_FAMILIES: dict[str, Family] = {}


def register(family: type[Family]) -> type[Family]:
    """Decorates the class of a family, which has one instance from then on.

    Raises:
        ValueError: another family of that name.
    """
    known = _FAMILIES.get(family.name)
    if known is not None and _path(type(known)) != _path(family):  # the same one: its module was reloaded
        raise ValueError(
            f"two families are called {family.name!r}: {_path(type(known))} and {_path(family)}; give one of "
            "them another `name`"
        )
    _FAMILIES[family.name] = family()
    return family


def _path(family: type[Family]) -> str:
    return f"{family.__module__}.{family.__qualname__}"


def families() -> tuple[Family, ...]:
    """All supported model families, in the order in which they were registered."""
    return tuple(_FAMILIES.values())


def family_named(name: str) -> Family:
    """The family of a name, such as `"flux"`.

    Raises:
        ValueError: no family has that name.
    """
    if name not in _FAMILIES:
        raise ValueError(f"no family is called {name!r}; the families are {', '.join(_FAMILIES)}")
    return _FAMILIES[name]


def family_of(transformer: Any) -> Family:
    """The family of a transformer.

    Raises:
        TypeError: a class that no family describes.
    """
    for family in families():
        if family.matches(transformer):
            return family
    if reason := why_refused(transformer):
        raise TypeError(f"{type(transformer).__name__} is not supported: {reason}")
    known = ", ".join(f"{family.transformer} ({family.name})" for family in families())
    raise TypeError(
        f"{type(transformer).__name__} is not supported; supported transformers are {known}; "
        "of another, tell `enable` by `layout` where its tokens are"
    )
