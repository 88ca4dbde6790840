"""Perturbation guidance as a guider of diffusers' modular pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from torch import nn

from .perturbation import HeadPerturbation


class HeadPerturbationGuidance(ClassifierFreeGuidance):
    """uncond + g (cond - uncond) + w (cond - ptb), or without CFG cond + w (cond - ptb).

    In a modular pipeline: `pipe.update_components(guider=HeadPerturbationGuidance(perturbation))`. Whole
    layers, as in PAG and SEG, are given by their numbers: `HeadPerturbation([8, 9], kind="pag")`. What is
    enabled on the transformer stays in force. The perturbed prediction is a whole forward of its own; in
    ordinary pipelines `Recipe(guidance=...)` shares the first layers.

    Args:
        perturbation: what is perturbed, w (its `scale`) and in which steps; or its `to_dict()`.
        guidance_scale: g; 1 is without CFG.
        start, stop: the fraction of the steps with CFG.
        enabled: False: the conditional prediction alone.

    Raises:
        TypeError: a perturbation that is neither.
        ValueError: see `HeadPerturbation.from_dict`.
    """

    _input_predictions: ClassVar[list[str]] = ["pred_cond", "pred_uncond", "pred_perturbed"]

    @register_to_config
    def __init__(
        self,
        perturbation: HeadPerturbation | Mapping[str, Any],
        guidance_scale: float = 7.5,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        super().__init__(guidance_scale=guidance_scale, start=start, stop=stop, enabled=enabled)
        if isinstance(perturbation, Mapping):
            perturbation = HeadPerturbation.from_dict(perturbation)
        if not isinstance(perturbation, HeadPerturbation):
            raise TypeError(f"`perturbation` must be a `HeadPerturbation`, got {perturbation!r}")
        self.perturbation = perturbation
        if not callable(perturbation.strength):  # plain data, which a guider's config file can hold
            self.register_to_config(perturbation=perturbation.to_dict())
        self._applied = ExitStack()

    @property
    def predictions(self) -> list[str]:
        """Names of the predictions that this step needs, in order."""
        names = ["pred_cond"]
        names += ["pred_uncond"] if self._is_cfg_enabled() else []
        return names + (["pred_perturbed"] if self._strength() else [])

    @property
    def num_conditions(self) -> int:
        return len(self.predictions)

    @property
    def is_conditional(self) -> bool:
        return self.predictions[self._count_prepared - 1] != "pred_uncond"

    def prepare_inputs(self, data: dict[str, Any]) -> list:
        return [self._prepare_batch(data, name == "pred_uncond", name) for name in self.predictions]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list:
        return [
            self._prepare_batch_from_block_state(input_fields, data, name == "pred_uncond", name)
            for name in self.predictions
        ]

    def set_state(self, *args: Any, **kwargs: Any) -> None:
        super().set_state(*args, **kwargs)
        self._applied.close()  # of a run that was aborted

    def prepare_models(self, denoiser: nn.Module) -> None:
        super().prepare_models(denoiser)
        if self.predictions[self._count_prepared - 1] == "pred_perturbed":
            constant = replace(self.perturbation, strength=self._strength())
            self._applied.enter_context(constant.applied(denoiser))

    def cleanup_models(self, denoiser: nn.Module) -> None:
        self._applied.close()

    def forward(
        self,
        pred_cond: torch.Tensor,
        pred_uncond: torch.Tensor | None = None,
        pred_perturbed: torch.Tensor | None = None,
    ) -> GuiderOutput:
        output = super().forward(pred_cond, pred_uncond)
        if pred_perturbed is not None:
            wide = torch.promote_types(pred_cond.dtype, torch.float32)
            shift = self.perturbation.scale * (pred_cond.to(wide) - pred_perturbed.to(wide))
            output.pred = (output.pred.to(wide) + shift).to(output.pred.dtype)
        return output

    def _strength(self) -> float:
        """Of the perturbation at this step; 0 without."""
        if not self._enabled:
            return 0.0
        return self.perturbation.strength_at(self._step or 0, self._num_inference_steps)
