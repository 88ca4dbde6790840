"""Steps aside for Hugging Face's package `kernels`.

With the root of a checkout on the path (as in `python -m ...` started there), `import kernels` finds this
folder first. diffusers and transformers look for Hugging Face's package under that name and must get it.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path


def step_aside() -> None:
    """Replaces the top-level module `kernels` by the package of that name elsewhere on the path, if any."""
    root = Path(__file__).resolve().parents[1]
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != root]
    spec = PathFinder.find_spec("kernels", elsewhere)
    if spec is not None:
        module = sys.modules["kernels"] = module_from_spec(spec)
        spec.loader.exec_module(module)
