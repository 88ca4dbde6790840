"""Adapters of whole weights and pooling weights: published checkpoints of CLEAR, and folders."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from dit_accel.patterns import Clear
from dit_accel.recipe import adapter as module
from dit_accel.recipe.adapter import Adapter
from dit_accel.recipe.adapter_parts import Whole
from dit_accel.recipe.recipe import Recipe

LAYER = "transformer_blocks.0.attn"
POOLING = f"{LAYER}.processor.spatial_weight"


def published() -> dict[str, torch.Tensor]:
    """Keys and shapes of `clear_local_16_down_4.safetensors`, of two narrow blocks."""
    torch.manual_seed(0)
    found = {}
    single = "single_transformer_blocks.0.attn"
    for name in [f"{LAYER}.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0")] + [f"{single}.to_q"]:
        found |= {f"{name}.weight": torch.randn(6, 4), f"{name}.bias": torch.randn(6)}
    return found | {f"{x}.processor.spatial_weight": torch.rand(1, 1, 1, 4, 1, 4, 1) for x in (LAYER, single)}


@pytest.fixture
def file(tmp_path):
    save_file(published(), tmp_path / "clear_local_16_down_4.safetensors")
    return tmp_path / "clear_local_16_down_4.safetensors"


def test_a_published_checkpoint_is_an_adapter(file):
    part = Adapter(file).parts[""]
    assert part.whole
    assert part.layers[f"{LAYER}.to_out.0"] == Whole(4, 6, True)
    assert len(part.layers) == 5
    weight, bias = part.tensors()[f"{LAYER}.to_q"]
    assert torch.equal(weight, published()[f"{LAYER}.to_q.weight"])
    assert torch.equal(bias, published()[f"{LAYER}.to_q.bias"])
    assert torch.equal(part.learned_weights()[LAYER]["spatial_weight"], published()[POOLING].view(4, 4))
    assert part.describe() == "whole weights of 5 linear layers, pooling weights of 2 layers"


BAD = {
    "another key": ({"proj_out.weight": torch.ones(2, 2)}, "has the key 'proj_out.weight', which is neither"),
    "a norm": ({f"{LAYER}.norm_q.weight": torch.ones(2)}, "which is neither of a projection"),
    "no weight": ({f"{LAYER}.to_k.weight": None}, f"has a bias of {LAYER}.to_k and no weight"),
    "another bias": ({f"{LAYER}.to_k.bias": torch.ones(5)}, "not those of a linear layer"),
    "integers": ({f"{LAYER}.to_k.bias": torch.ones(6).int()}, "save it in 16 or 32 bit floats"),
    "flat pooling": ({POOLING: torch.ones(16)}, r"not \(1, 1, 1, f, 1, f, 1\)"),
    "oblong pooling": ({POOLING: torch.ones(1, 1, 1, 4, 1, 2, 1)}, r"not \(1, 1, 1, f, 1, f, 1\)"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_what_is_refused(file, change, message):
    tensors = {name: x for name, x in (published() | change).items() if x is not None}
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message) as error:
        Recipe(Clear(8, downsample=4), adapter=file)
    assert str(file) in str(error.value)


def test_numbers_are_checked_when_they_act(file):
    part = Adapter(file).parts[""]
    save_file(published() | {POOLING: torch.full((1, 1, 1, 4, 1, 4, 1), float("inf"))}, file)
    with pytest.raises(ValueError, match=r"pooling weights of .* are not finite"):
        part.learned_weights()
    save_file(published() | {f"{LAYER}.to_q.bias": torch.ones(7)}, file)
    with pytest.raises(ValueError, match="has changed since the recipe was made"):
        part.tensors()


def test_folders_are_written_and_read(tmp_path):
    weights = {f"{LAYER}.to_q": (torch.randn(6, 4), torch.randn(6)), f"{LAYER}.to_k": (torch.randn(6, 4),)}
    learned = {LAYER: {"spatial_weight": torch.rand(2, 2)}}
    module.write_weights(tmp_path / "whole", weights, {"steps": 3}, learned)
    part = Adapter(tmp_path / "whole").parts[""]
    for name, tensors in part.tensors().items():
        assert all(map(torch.equal, tensors, weights[name]))
    assert torch.equal(part.learned_weights()[LAYER]["spatial_weight"], learned[LAYER]["spatial_weight"])


def test_pooling_weights_beside_lora(tmp_path):
    """In a file of their own; PEFT reads the rest."""
    learned = {LAYER: {"spatial_weight": torch.rand(2, 2)}}
    pair = {f"{LAYER}.to_q": (torch.ones(2, 4), torch.ones(6, 2))}
    module.write(tmp_path / "lora", pair, 2.0, None, learned)
    found = Adapter(tmp_path / "lora")
    (kept,) = found.parts[""].learned_weights()[LAYER].values()
    assert torch.equal(kept, learned[LAYER]["spatial_weight"])
    assert all(".lora_" in key for key in load_file(tmp_path / "lora" / module.WEIGHTS))
    before = found.digest
    module.write(tmp_path / "lora", pair, 2.0, None, {LAYER: {"spatial_weight": torch.zeros(2, 2)}})
    assert Adapter(tmp_path / "lora").digest != before
    save_file({"x": torch.ones(2)}, tmp_path / "lora" / module.LEARNED_WEIGHTS)
    with pytest.raises(ValueError, match="has the key 'x', which is none of learned weights"):
        Adapter(tmp_path / "lora")


def test_projections_as_turbo_wan_names_them(tmp_path):
    """Alone in a file, and among weights that are not loaded: the first of which is named."""
    key, file = "blocks.3.self_attn.attn_op.local_attn.proj_l", tmp_path / "proj_l.safetensors"
    weight, bias = torch.randn(8, 8), torch.randn(8)
    save_file({f"{key}.weight": weight, f"{key}.bias": bias}, file)
    part = Adapter(file).parts[""]
    (learned,) = part.learned_weights().items()
    assert learned[0] == "blocks.3.attn1"
    assert torch.equal(learned[1]["proj_l.weight"], weight)
    assert torch.equal(learned[1]["proj_l.bias"], bias)
    assert part.describe() == "projections of linear attention of 1 layers"
    save_file({f"{key}.weight": weight, "blocks.3.ffn.0.weight": weight.clone()}, file)
    with pytest.raises(ValueError, match=r"has the key 'blocks.3.ffn.0.weight', which is neither"):
        Adapter(file)
