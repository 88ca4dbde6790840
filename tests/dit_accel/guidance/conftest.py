"""The oracle of perturbed attention: diffusers' own processors over explicit attention maps."""

from __future__ import annotations

import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from dit_accel import TokenLayout
from dit_accel.guidance import HeadPerturbation
from dit_accel.pipelines import family_of

IMAGE, VIDEO = (1, 8, 12), (3, 6, 8)
GRIDS = {"flux": IMAGE, "sd3": IMAGE, "wan": VIDEO, "hunyuan": VIDEO, "hunyuan15": VIDEO}


def blurred(q: torch.Tensor, layout: TokenLayout, sigma: float, text: int) -> torch.Tensor:
    """Queries (H, S, D) of one sample in the model's order, convolved; `text` valid tokens of it too."""

    def line(x: torch.Tensor) -> torch.Tensor:  # (n, 1, length)
        length = x.shape[-1]
        wished = math.ceil(6 * sigma)
        size = min(wished + 1 - wished % 2, length + 1 if length % 2 == 0 else length)
        weights = torch.exp(-0.5 * (torch.linspace(-(size // 2), size // 2, size).to(x) / sigma) ** 2)
        padded = F.pad(x, (size // 2, size // 2), mode="reflect")
        return F.conv1d(padded, (weights / weights.sum())[None, None])

    out = q.clone()
    frames = q[:, layout.visual_slice].transpose(1, 2).unflatten(2, layout.grid)  # (H, D, F, h, w)
    across = line(frames.reshape(-1, 1, layout.grid[2])).view(frames.shape).transpose(3, 4)
    down = line(across.reshape(-1, 1, layout.grid[1])).view(across.shape).transpose(3, 4)
    out[:, layout.visual_slice] = down.flatten(2).transpose(1, 2)
    if text:
        at = slice(layout.text_slice.start, layout.text_slice.start + text)
        words = q[:, at].transpose(1, 2)
        out[:, at] = line(words.reshape(-1, 1, text)).view(words.shape).transpose(1, 2)
    return out


def perturbed_attention(q, k, v, seen, layout: TokenLayout, perturbation: HeadPerturbation, heads: dict):
    """One sample (H, S, D) in the model's order; `seen` bool, broadcast to (H, S, S): who attends to whom."""
    logits = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    padding = ~seen.expand(logits.shape).any(0).any(0)  # keys that nobody attends to

    def attention(logits, seen=seen):
        return torch.softmax(logits.masked_fill(~seen, -math.inf), -1)

    maps = attention(logits)
    images = torch.ones(layout.seq_len, dtype=torch.bool)
    images[layout.text_slice] = False
    kind, own = perturbation.kind, torch.eye(layout.seq_len, dtype=torch.bool)
    if kind in ("pag", "soft_pag") and perturbation.tokens == "image":
        other = attention(logits, (own | ~(images[:, None] & images)) & ~padding)
    elif kind in ("pag", "soft_pag"):
        other = own.to(maps).expand_as(maps)
    elif kind == "uniform":
        other = ((~padding).to(maps) / (~padding).sum()).expand_as(maps)
    elif kind == "temperature":
        other = attention(logits * perturbation.temperature)
    else:
        text = int((~padding)[layout.text_slice].sum()) if perturbation.tokens == "all" else 0
        soft = blurred(q, layout, perturbation.sigma, text)
        other = attention(soft @ k.transpose(1, 2) * q.shape[-1] ** -0.5)
    rows = images if perturbation.tokens == "image" else torch.ones_like(images)
    for head, strength in heads.items():
        mixed = (1 - strength) * maps[head] + strength * other[head]
        maps[head] = torch.where(rows[:, None], mixed, maps[head])
    return maps @ v


class ExplicitProcessor:
    """A diffusers processor whose attention is computed by `perturbed_attention`."""

    def __init__(self, original, layout, perturbation, heads, mask=None):
        self.original, self.layout, self.perturbation, self.heads = original, layout, perturbation, heads
        self.mask = torch.ones(1, 1, dtype=torch.bool) if mask is None else mask

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        def attend(query, key, value, attn_mask=None, **options):
            samples = []
            for i, qkv in enumerate(zip(query, key, value, strict=True)):
                seen = self.mask if attn_mask is None else self.mask & attn_mask[i, 0].any(0)
                samples.append(perturbed_attention(*qkv, seen, self.layout, self.perturbation, self.heads))
            return torch.stack(samples)

        with mock.patch.object(F, "scaled_dot_product_attention", attend):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


class Case:
    """One family: its tiny pipeline, and transformers under explicit, perturbed maps."""

    def __init__(self, name: str, tools: SimpleNamespace):
        self.name, self.run, self.pipe_inputs, self._make = name, tools.run, tools.inputs, tools.make
        self.grid, self.text_len = GRIDS[name], 0 if name == "wan" else 7
        self.config = {"dual_attention_layers": (0, 2), "qk_norm": "rms_norm"} if name == "sd3" else {}

    def make(self):
        """A new pipeline, always of the same weights."""
        return self._make(**self.config)

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict:
        """What a pipeline passes to its transformer."""
        inputs = self.pipe_inputs(self.make())
        return {
            k: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for k, x in inputs.items()
        }

    def explain(self, transformer, perturbation, strength=None, pattern=None, layers=(), text_len=None):
        """Put explicit maps under the perturbed layers, and dense masks of a pattern under `layers`."""
        family = family_of(transformer)
        modules = family.layers(transformer)
        heads = perturbation.layers(list(modules), transformer.config.num_attention_heads)
        strength = perturbation.strength if strength is None else strength
        text_len = self.text_len if text_len is None else text_len
        layout = TokenLayout(self.grid, text_len, text_first=self.name == "flux")
        for name, module in modules.items():
            own, weights = family.layer_layout(name, layout), heads.get(name, {})
            mask = None
            if pattern is not None:
                patterns = pattern if isinstance(pattern, tuple) else (pattern,)  # of each head, or of all
                mask = torch.stack([p.token_mask(own) for p in patterns])
            if weights or mask is not None:
                weights = {head: strength * weight for head, weight in weights.items()}
                module.set_processor(ExplicitProcessor(module.processor, own, perturbation, weights, mask))
        return transformer


@pytest.fixture
def case(family, request) -> Case:
    return Case(family, request.getfixturevalue(family))
