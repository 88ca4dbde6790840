"""Feature extractors of the set metrics: the bundled scene encoder, EfficientNet-Lite0, InceptionV3 and CLIP.

Each takes pictures of any size, uint8 (height, width, 3), and returns float32 features (n, d). Its
`fingerprint` is the hash of its weights, `resize` says how pictures were brought to its size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from dit_accel.errors import UnavailableError
from dit_accel.scorers import efficientnet, pretrained, scene_encoder
from dit_accel.scorers.pretrained import Sources

RESIZES = ("clean", "legacy")


class Extractor(ABC):
    """What turns pictures into features.

    Args:
        sources: Where its weights may come from.
        device: To run on.
        resize: One of `RESIZES`; only InceptionV3 has a choice.

    Raises:
        UnavailableError: its weights are not here.
    """

    name: str
    title: str
    weights: pretrained.WeightsFile | pretrained.HubModel | None = None
    packages: tuple[str, ...] = ()
    extra: str = "eval"

    def __init__(self, sources: Sources, device: torch.device, resize: str = "clean"):
        self.device = device
        self.module = self._load(sources).to(device).eval()
        self.resize = self._resize_name(resize)
        self.fingerprint = pretrained.fingerprint(self.module)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        return self._features(pictures).float().cpu()

    def _resize_name(self, resize: str) -> str:
        return "bicubic, antialiased"

    @abstractmethod
    def _load(self, sources: Sources) -> torch.nn.Module: ...

    @abstractmethod
    def _features(self, pictures: Sequence[np.ndarray]) -> torch.Tensor: ...

    def _batch(self, pictures: Sequence[np.ndarray], side: int) -> torch.Tensor:
        """(n, 3, side, side) in [0, 1], but for what the bicubic filter overshoots."""
        tensors = (torch.tensor(one, device=self.device).permute(2, 0, 1)[None] / 255 for one in pictures)
        return torch.cat([scene_encoder.resize(tensor, side) for tensor in tensors])


class Scenes(Extractor):
    """The bundled encoder: 96 features of 64 x 64 pixels. It knows the bundled scenes and nothing else."""

    name = "scenes"
    title = "the bundled scene encoder, not comparable with FID"

    def _load(self, sources: Sources) -> torch.nn.Module:
        return scene_encoder.load()

    def _features(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        return self.module(self._batch(pictures, scene_encoder.SIDE) * 2 - 1)


class EfficientNet(Extractor):
    """EfficientNet-Lite0 of ImageNet: 1,280 features of 224 x 224 pixels."""

    name = "efficientnet"
    title = "EfficientNet-Lite0 of ImageNet, not comparable with FID"
    packages = efficientnet.PACKAGES
    extra = "efficientnet"

    def _load(self, sources: Sources) -> torch.nn.Module:
        return efficientnet.load()

    def _features(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        return self.module(self._batch(pictures, efficientnet.SIDE))


class Inception(Extractor):
    """InceptionV3 of 2015 as FID is defined with, in TorchScript: 2,048 features of 299 x 299 pixels.

    `clean` resizes each channel with Pillow's bicubic filter in floats, as clean-fid does (Parmar et al.
    2022); `legacy` leaves it to the bilinear sampling without antialiasing of the network's own graph.
    """

    name = "inception"
    title = "InceptionV3 of 2015"
    weights = pretrained.INCEPTION
    side = 299

    def _load(self, sources: Sources) -> torch.nn.Module:
        try:
            return torch.jit.load(self.weights.get(sources), map_location=self.device)
        except RuntimeError as error:
            if isinstance(error, UnavailableError):
                raise
            raise UnavailableError(f"{self.weights.name} cannot be loaded by this torch: {error}") from error

    def _resize_name(self, resize: str) -> str:
        return resize

    def _features(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        if self.resize == "legacy":
            tensors = (torch.tensor(one, device=self.device).permute(2, 0, 1)[None] for one in pictures)
            return torch.cat([self.module(tensor.float(), return_features=True) for tensor in tensors])
        resized = np.stack([self._clean(picture) for picture in pictures])
        pixels = torch.from_numpy(resized).to(self.device)
        return self.module.layers((pixels - 128) / 128).flatten(1)

    def _clean(self, picture: np.ndarray) -> np.ndarray:
        channels = [Image.fromarray(channel.astype(np.float32)) for channel in np.moveaxis(picture, -1, 0)]
        size = (self.side, self.side)
        return np.stack([np.asarray(one.resize(size, Image.Resampling.BICUBIC)) for one in channels])


class Clip(Extractor):
    """Image embeddings of CLIP ViT-L/14 at 336 x 336 pixels, 768 features, as CMMD uses them."""

    name = "clip"
    title = "CLIP ViT-L/14 336"
    weights = pretrained.CLIP
    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)

    def _load(self, sources: Sources) -> torch.nn.Module:
        from transformers import CLIPVisionModelWithProjection

        return self.weights.load(CLIPVisionModelWithProjection, sources)

    def _features(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        pixels = self._batch(pictures, self.module.config.image_size)
        mean, std = (torch.tensor(values).view(3, 1, 1).to(pixels) for values in (self.mean, self.std))
        return self.module(pixel_values=(pixels - mean) / std).image_embeds


EXTRACTORS: dict[str, type[Extractor]] = {kind.name: kind for kind in (Scenes, EfficientNet, Inception, Clip)}
