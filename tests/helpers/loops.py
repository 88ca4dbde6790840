"""A plain sampling loop around a transformer whose own pipeline would need encoders to be made."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline


class Loop(DiffusionPipeline):
    """Euler's steps from given latents, with guidance in one batch or in two calls."""

    do_classifier_free_guidance = False

    def __init__(self, transformer: Any, scheduler: Any):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(
        self, latents: torch.Tensor, cond: dict, uncond: dict, steps: int, cfg: float, batched: bool
    ) -> torch.Tensor:
        """The latents, like those given; the inputs beside latents and timestep are `cond` and `uncond`.

        What of them is called `conditions` are channels of the transformer's latents that stay as they are.
        """
        self.scheduler.set_timesteps(steps)
        self.do_classifier_free_guidance = cfg > 1

        def predicted(latents: torch.Tensor, given: dict, branch: str) -> torch.Tensor:
            timestep, given = t.expand(len(latents)), dict(given)
            if (conditions := given.pop("conditions", None)) is not None:
                latents = torch.cat([latents, conditions], dim=1)
            inputs = {"hidden_states": latents, "timestep": timestep, "return_dict": True, **given}
            with getattr(self.transformer, "cache_context", nullcontext)(branch):
                return self.transformer(**inputs).sample

        for t in self.scheduler.timesteps:
            self.current_timestep = t
            if cfg > 1 and batched:
                both = {name: _joined(uncond[name], x) for name, x in cond.items()}
                without, out = predicted(torch.cat([latents] * 2), both, "cond_uncond").chunk(2)
            else:
                out = predicted(latents, cond, "cond")
                without = predicted(latents, uncond, "uncond") if cfg > 1 else out
            out = without + cfg * (out - without) if cfg > 1 else out
            latents = self.scheduler.step(out, t, latents, return_dict=False)[0]
        self.maybe_free_model_hooks()  # caches forget the run
        return latents


def _joined(a: Any, b: Any) -> Any:
    return torch.cat([a, b]) if isinstance(b, torch.Tensor) else b
