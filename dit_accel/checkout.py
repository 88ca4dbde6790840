"""Lets the library run from a bare checkout, without being installed: `python -m dit_accel...` at its root.

Installed, `kernels`, `pipelines`, `demos` and `evals` are subpackages of `dit_accel`; in a checkout they lie
beside it, and so does `pyproject.toml`.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

if (ROOT / "pyproject.toml").is_file():
    sys.modules[__package__].__path__.append(str(ROOT))
