"""The user's cache folder, where compiled code and finished parts of evaluations are kept."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache_folder() -> Path:
    """`$XDG_CACHE_HOME`; `~/.cache` where that is unset, or relative and hence to be ignored.

    Source: XDG Base Directory Specification 0.8.

    Raises:
        RuntimeError: neither the variable nor a home folder tells.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return folder if folder.is_absolute() else Path.home() / ".cache"
