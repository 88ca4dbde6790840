"""Models from the user's folder: whole ones load, and those with weights missing are refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel

from dit_accel.errors import UnavailableError
from dit_accel.scorers.pretrained import HubModel, Sources, fingerprint

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**SIZES, image_size=32, patch_size=16)).eval()
    model.save_pretrained(tmp_path / "vit")
    return model, tmp_path / "vit" / "model.safetensors", Sources(tmp_path)


def test_a_whole_model_loads(saved):
    model, _, sources = saved
    assert fingerprint(HubModel("someone/vit").load(ViTModel, sources)) == fingerprint(model)


def test_a_model_with_missing_weights_is_refused(saved):
    """transformers would draw them at random and go on."""
    _, path, sources = saved
    weights = load_file(path)
    lost = sorted(weights)[0]
    save_file({name: value for name, value in weights.items() if name != lost}, path, {"format": "pt"})
    with pytest.raises(UnavailableError, match=rf"vit cannot be loaded: the weights lack {lost}"):
        HubModel("someone/vit").load(ViTModel, sources)
