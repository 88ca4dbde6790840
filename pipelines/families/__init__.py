"""Model families: one module for each. Every module of this folder is imported and registers its family."""

from importlib import import_module
from pkgutil import iter_modules

from .registry import families, family_named, family_of, register

__all__ = ["families", "family_named", "family_of", "register"]

for _module in sorted(module.name for module in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")
