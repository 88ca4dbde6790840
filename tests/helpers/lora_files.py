"""Random LoRA of a transformer's attention: as files, loaded by PEFT, and added to the weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dit_accel.pipelines import family_of
from dit_accel.recipe import adapter

RANK, ALPHA = 4, 6.0


def linears(transformer: nn.Module) -> dict[str, nn.Linear]:
    """Projections of the attention layers by name."""
    places = {module: name for name, module in transformer.named_modules()}
    return {
        f"{places[layer]}.{name}": module
        for layer in family_of(transformer).layers(transformer).values()
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }


def drawn(transformer: nn.Module, seed: int = 7) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each projection, large enough to be seen."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    return {
        name: (normal(RANK, own.in_features), normal(own.out_features, RANK))
        for name, own in linears(transformer).items()
    }


def save(transformer: nn.Module, folder: Path, seed: int = 7) -> Path:
    """A PEFT folder of them."""
    adapter.write(folder, drawn(transformer, seed), ALPHA)
    return folder


@torch.no_grad()
def add(transformer: nn.Module, seed: int = 7) -> None:
    """What the LoRA does, to the weights themselves."""
    layers = linears(transformer)
    for name, (a, b) in drawn(transformer, seed).items():
        layers[name].weight += ALPHA / RANK * b @ a


def load(transformer: nn.Module, name: str, scale: float = 1.0, seed: int = 8) -> None:
    """Another one by PEFT, at a scale, on queries and values alone."""
    import peft

    targets = ["to_q", "to_v", "to_query", "to_value"]  # the latter are Kandinsky 5's
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(seed)
    peft.inject_adapter_in_model(config, transformer, adapter_name=name)
    for module in transformer.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale(name, scale)
