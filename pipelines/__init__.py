"""Model families: what is known of diffusers' transformers, and loading of pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .families import families, family_named, family_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["families", "family_named", "family_of", "load"]


def load(name: str | Path, **kwargs: Any) -> DiffusionPipeline:
    """A diffusers pipeline by bundled name, local folder or Hugging Face hub id.

    Args:
        name: `"tiny-flux"`, `"tiny-wan"`, ...; a folder with a `model_index.json`; or a hub id such as
            `"black-forest-labs/FLUX.1-dev"`.
        kwargs: passed to `DiffusionPipeline.from_pretrained`.

    Raises:
        ValueError: a folder that is not a pipeline's, or a name that is none of the three.
    """
    from diffusers import DiffusionPipeline

    from . import tiny

    path = tiny.weights_dir(str(name)) if str(name) in tiny.NAMES else Path(name).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ValueError(f"{path} is not a diffusers pipeline folder: it has no model_index.json")
        return DiffusionPipeline.from_pretrained(path, **kwargs)
    if path.exists() or path.is_absolute() or str(name).count("/") != 1 or str(name).startswith((".", "~")):
        raise ValueError(
            f"{str(name)!r} is neither a bundled model ({', '.join(tiny.NAMES)}), nor a pipeline folder, nor "
            "a hub id such as black-forest-labs/FLUX.1-dev"
        )
    return DiffusionPipeline.from_pretrained(str(name), **kwargs)
