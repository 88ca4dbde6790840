"""Weights that are not bundled: where they are looked for, how they are checked, and what to do without.

A file is looked for in the folder given with `--weights`, then where `torch.hub` and `huggingface_hub` keep
what they download. Nothing is downloaded unless that is allowed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UnavailableError
from .folders import digest

HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Sources:
    """Where weights may come from: a folder of the user's, and the network if `download`."""

    folder: Path | None = None
    download: bool = False


@dataclass(frozen=True)
class WeightsFile:
    """One file that `torch.hub` could download; `sha256` may be the beginning of the hash."""

    name: str
    sha256: str
    url: str

    def describe(self) -> dict[str, Any]:
        return {"file": self.name, "sha256": self.sha256, "url": self.url, "put_into": str(_hub())}

    def _found(self, sources: Sources) -> Path | None:
        folders = [folder for folder in (sources.folder, _hub()) if folder is not None]
        return next((folder / self.name for folder in folders if (folder / self.name).is_file()), None)

    def missing(self, sources: Sources) -> str | None:
        """Why the file cannot be used, and the remedy; None if it can."""
        path = self._found(sources)
        if path is None:
            if sources.download:
                return None
            return (
                f"there is no {self.name} (sha256 begins with {self.sha256[:8]}); put it into {_hub()} or a "
                f"folder given with --weights, or pass --allow-download ({self.url})"
            )
        if not digest(path).startswith(self.sha256):
            return f"{path} is damaged or another file: its sha256 does not begin with {self.sha256[:8]}"
        return None

    def get(self, sources: Sources) -> Path:
        """The file, downloaded if it must and may be.

        Raises:
            UnavailableError: naming what to do.
        """
        reason = self.missing(sources)
        if reason is not None:
            raise UnavailableError(reason)
        path = self._found(sources)
        if path is not None:
            return path
        path = _hub() / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(self.url, str(path), hash_prefix=self.sha256, progress=False)
        except (OSError, RuntimeError) as error:  # no network, or not the hash
            raise UnavailableError(f"{self.name} could not be downloaded from {self.url}: {error}") from error
        return path


@dataclass(frozen=True)
class HubModel:
    """A transformers model in the Hugging Face cache, or in a subfolder of the user's folder."""

    repository: str

    @property
    def _subfolder(self) -> str:
        return self.repository.split("/")[-1]

    def describe(self) -> dict[str, Any]:
        from huggingface_hub.constants import HF_HUB_CACHE

        return {
            "file": f"config.json and {' or '.join(HUB_WEIGHTS)}",
            "sha256": None,
            "url": f"https://huggingface.co/{self.repository}",
            "put_into": HF_HUB_CACHE,
        }

    def _found(self, sources: Sources) -> str | None:
        from huggingface_hub import try_to_load_from_cache

        if sources.folder is not None:
            folder = sources.folder / self._subfolder
            if (folder / "config.json").is_file() and any((folder / n).is_file() for n in HUB_WEIGHTS):
                return str(folder)
        config, *weights = (
            isinstance(try_to_load_from_cache(self.repository, name), str)
            for name in ("config.json", *HUB_WEIGHTS)
        )
        return self.repository if config and any(weights) else None

    def missing(self, sources: Sources) -> str | None:
        """Why the model cannot be used, and the remedy; None if it can."""
        if sources.download or self._found(sources) is not None:
            return None
        return (
            f"{self.repository} is not in the Hugging Face cache; put its config.json and "
            f"{' or '.join(HUB_WEIGHTS)} into {self._subfolder}/ in a folder given with --weights, or pass "
            "--allow-download"
        )

    def load(self, model_class: Any, sources: Sources) -> torch.nn.Module:
        """The model, downloaded if it must and may be.

        Raises:
            UnavailableError: naming what to do; also for files that lack some of the model's weights.
        """
        reason = self.missing(sources)
        if reason is not None:
            raise UnavailableError(reason)
        found = self._found(sources)
        options = {"local_files_only": found is not None, "output_loading_info": True}
        try:
            model, info = model_class.from_pretrained(found or self.repository, **options)
            if info["missing_keys"]:  # transformers would leave these random
                raise ValueError(f"the weights lack {min(info['missing_keys'])}")
        except (OSError, ValueError, RuntimeError) as error:
            raise UnavailableError(f"{found or self.repository} cannot be loaded: {error}") from error
        return model


def _hub() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def fingerprint(module: torch.nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers, by name."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


INCEPTION = WeightsFile(
    "inception-2015-12-05.pt",
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
)
ALEXNET = WeightsFile(
    "alexnet-owt-7be5be79.pth", "7be5be79", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
)
CLIP = HubModel("openai/clip-vit-large-patch14-336")
CLIP_B32 = HubModel("openai/clip-vit-base-patch32")
DINO = HubModel("facebook/dino-vitb16")
