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

from dit_accel.errors import UnavailableError
from dit_accel.files import digest

MODEL_FILES = (("config.json",), ("model.safetensors", "pytorch_model.bin"))  # of a group one is enough


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
class HubFiles:
    """Files of a repository in the Hugging Face cache, or in a subfolder of the user's folder.

    Of a group of `files` one is enough. `only_cache` is for packages that look nowhere else.
    """

    repository: str
    files: tuple[tuple[str, ...], ...]
    only_cache: bool = False

    @property
    def _subfolder(self) -> str:
        return self.repository.split("/")[-1]

    @property
    def _wanted(self) -> str:
        *others, last = (" or ".join(group) for group in self.files)
        return f"{', '.join(others)} and {last}" if others else last

    def describe(self) -> dict[str, Any]:
        from huggingface_hub.constants import HF_HUB_CACHE

        return {
            "file": self._wanted,
            "sha256": None,
            "url": f"https://huggingface.co/{self.repository}",
            "put_into": HF_HUB_CACHE,
        }

    def _in_folder(self, sources: Sources) -> list[Path] | None:
        """The files in the user's folder, one of each group; None if they are not all there."""
        if sources.folder is None or self.only_cache:
            return None
        folder = sources.folder / self._subfolder
        found = [[folder / name for name in group if (folder / name).is_file()] for group in self.files]
        return [group[0] for group in found] if all(found) else None

    def _in_cache(self) -> list[Path] | None:
        """The files in the Hugging Face cache, one of each group; None if they are not all there."""
        from huggingface_hub import try_to_load_from_cache

        places = [[try_to_load_from_cache(self.repository, name) for name in group] for group in self.files]
        found = [[Path(place) for place in group if isinstance(place, str)] for group in places]
        return [group[0] for group in found] if all(found) else None

    def found(self, sources: Sources) -> str | None:
        """What `from_pretrained` is to be given, a folder or the repository; None if neither has all."""
        files = self._in_folder(sources)
        if files is not None:
            return str(files[0].parent)
        return self.repository if self._in_cache() is not None else None

    def missing(self, sources: Sources) -> str | None:
        """Why the files cannot be used, and the remedy; None if they can."""
        if sources.download or self.found(sources) is not None:
            return None
        place = f"put its {self._wanted} into {self._subfolder}/ in a folder given with --weights"
        if self.only_cache:
            place = f"fetch its {self._wanted} (hf download {self.repository})"
        return f"{self.repository} is not in the Hugging Face cache; {place}, or pass --allow-download"

    def place(self, sources: Sources) -> str:
        """As `found`, or the repository if it may be downloaded.

        Raises:
            UnavailableError: naming what to do.
        """
        reason = self.missing(sources)
        if reason is not None:
            raise UnavailableError(reason)
        return self.found(sources) or self.repository

    def get(self, sources: Sources) -> list[Path]:
        """The files, one of each group, downloaded if they must and may be.

        Raises:
            UnavailableError: naming what to do.
        """
        reason = self.missing(sources)
        if reason is not None:
            raise UnavailableError(reason)
        found = self._in_folder(sources) or self._in_cache()
        if found is not None:
            return found
        from huggingface_hub import hf_hub_download

        try:
            return [Path(hf_hub_download(self.repository, group[0])) for group in self.files]
        except (OSError, RuntimeError) as error:  # no network, or not there
            raise UnavailableError(f"{self.repository} could not be downloaded: {error}") from error


@dataclass(frozen=True)
class HubModel(HubFiles):
    """A transformers model."""

    files: tuple[tuple[str, ...], ...] = MODEL_FILES

    def load(self, model_class: Any, sources: Sources) -> torch.nn.Module:
        """The model, downloaded if it must and may be.

        Raises:
            UnavailableError: naming what to do; also for files that lack some of the model's weights.
        """
        place = self.place(sources)
        options = {"local_files_only": self.found(sources) is not None, "output_loading_info": True}
        try:
            model, info = model_class.from_pretrained(place, **options)
            if info["missing_keys"]:  # transformers would leave these random
                raise ValueError(f"the weights lack {min(info['missing_keys'])}")
        except (OSError, ValueError, RuntimeError) as error:
            raise UnavailableError(f"{place} cannot be loaded: {error}") from error
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

_CLIP_L = "openai/clip-vit-large-patch14"
_CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_HPS = "adams-story/HPSv2-hf"
_READERS = (
    ("preprocessor_config.json", "processor_config.json"),
    ("tokenizer.json", "vocab.json"),
)
_WHOLE_L, _WHOLE_HPS = (HubModel(name, (*MODEL_FILES, *_READERS)) for name in (_CLIP_L, _HPS))
SCORERS = {  # of `dit_accel.scorers.image_scorers`: the weights, and image processor and tokenizer
    "clip": (_WHOLE_L, _WHOLE_L),
    "pickscore": (HubModel("yuvalkirstain/PickScore_v1"), HubFiles(_CLIP_H, _READERS)),
    "hpsv2": (_WHOLE_HPS, _WHOLE_HPS),
    "aesthetics": (
        HubModel("shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE"),
        HubFiles(_CLIP_L, _READERS[:1]),
    ),
}
IMAGE_REWARD = HubFiles("THUDM/ImageReward", (("ImageReward.pt",), ("med_config.json",)))
BERT = HubFiles("bert-base-uncased", (("vocab.txt",),), only_cache=True)  # ImageReward's tokenizer
TOPIQ = HubFiles("chaofengc/IQA-PyTorch-Weights", (("cfanet_nr_koniq_res50-9a73138b.pth",),))
