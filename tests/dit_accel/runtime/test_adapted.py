"""The LoRA of a recipe's adapter in a transformer, and out of it again."""

import copy
import pickle

import lora_files
import peft
import pytest
import torch
from left_behind import state_of
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter

from dit_accel import accelerated, disable, enable, summary
from dit_accel.patterns import Neighborhood
from dit_accel.planning.model_config import of_model
from dit_accel.planning.plan import plan
from dit_accel.recipe.recipe import Recipe

PATTERN = Neighborhood((3, 3, 3))


@pytest.fixture
def recipe(wan, tmp_path):
    return Recipe(PATTERN, adapter=lora_files.save(wan.make().transformer, tmp_path / "tuned"))


def run(wan, pipe=None):
    return wan.run(pipe or wan.pipe, steps=1)


def test_loaded_by_enable_and_unloaded_by_disable(wan, recipe):
    transformer = wan.pipe.transformer
    before, weights = state_of(transformer), {k: v.clone() for k, v in transformer.state_dict().items()}
    untouched = run(wan)
    with accelerated(wan.pipe, PATTERN):
        without = run(wan)
        with accelerated(wan.pipe, recipe):
            tuned = run(wan)
            assert transformer.state_dict().keys() == weights.keys()
            line = "LoRA of rank 4 in 12 linear layers"
            assert line in str(summary(wan.pipe))
        assert torch.equal(run(wan), without)
    assert not torch.allclose(tuned, without, atol=1e-3)
    assert state_of(transformer) == before
    assert all(torch.equal(x, weights[k]) for k, x in transformer.state_dict().items())
    assert torch.equal(run(wan), untouched)
    enable(wan.pipe, recipe)
    enable(wan.pipe, recipe)  # not twice
    assert torch.equal(run(wan), tuned)


def test_it_is_what_peft_computes(wan, recipe):
    """To the bit: the same products in the same order."""
    other = wan.make()
    model = peft.PeftModel.from_pretrained(other.transformer, recipe.adapter.path)
    assert model.get_base_model() is other.transformer
    with accelerated(wan.pipe, recipe), accelerated(other, PATTERN):
        assert torch.equal(run(wan), run(wan, other))


def test_other_dtypes_lose_nothing(wan, recipe):
    """The numbers of the file stay, whatever a call was in before: `.to(bf16)` and back."""
    enable(wan.pipe, recipe)
    lora, x = wan.pipe.transformer.blocks[0].attn1.to_q._dit_accel_lora, torch.ones(1, 32)
    expected = lora(x)
    assert lora(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(lora(x), expected)


def test_two_transformers(families, tmp_path):
    """Each its own; one without a part stays as it is."""
    pipe = families["wan"].make(two=True)
    folder = tmp_path / "both"
    lora_files.save(families["wan"].make().transformer, folder / "transformer_2")
    handle = enable(pipe, Recipe(PATTERN, adapter=folder))
    assert [b.adapted is not None for b in handle.bindings.values()] == [False, True]
    with pytest.raises(ValueError, match="there is no transformer_2 here"):
        enable(pipe.transformer_2, Recipe(PATTERN, adapter=folder))
    with pytest.raises(ValueError, match="does not say for which transformer"):
        enable(pipe, Recipe(PATTERN, adapter=folder / "transformer_2"))
    assert handle.active


def change(recipe, change):
    path = recipe.adapter.path / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    return Recipe(PATTERN, adapter=recipe.adapter.path)


def test_another_models_adapter_is_refused_before_anything_changes(wan, recipe):
    before = state_of(wan.pipe.transformer)
    deep = change(recipe, lambda w: {k.replace("blocks.0", "blocks.9"): v for k, v in w.items()})
    with pytest.raises(
        ValueError, match=r"LoRA of blocks\.9\..* does not have: it was made for another model"
    ):
        enable(wan.pipe, deep)
    wide = change(recipe, lambda w: {k: v.repeat(1, 2) if "lora_A" in k else v for k, v in w.items()})
    with pytest.raises(ValueError, match=r"inputs and .* in this model: it was made for another model"):
        enable(wan.pipe, wide)
    assert state_of(wan.pipe.transformer) == before
    with pytest.raises(ValueError, match="does not have: it was made for another model"):
        plan(recipe, model="tiny-flux")


def test_what_replaces_its_layers_is_named(wan, recipe):
    enable(wan.pipe, recipe)
    layer = wan.pipe.transformer.blocks[0].attn1
    kept, layer.to_q = layer.to_q, nn.Linear(layer.to_q.in_features, layer.to_q.out_features)
    with pytest.raises(RuntimeError, match=r"blocks.0.attn1.to_q.* was replaced .* enable again"):
        run(wan)
    layer.to_q = kept
    wan.pipe.transformer.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match="are fused"):
        run(wan)


class Int8(nn.Linear):
    """Weights in 8 bits, as quantizing libraries keep them."""

    def forward(self, x):
        return nn.functional.linear(x, self.codes * self.scales, self.bias)

    @classmethod
    def of(cls, layer):
        layer.scales = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        layer.codes = (layer.weight.detach() / layer.scales).round()
        layer.__class__ = cls


def test_quantized_weights_keep_it(wan, recipe):
    exact = wan.make()
    with accelerated(exact, recipe):
        expected = run(wan, exact)
    for layer in lora_files.linears(wan.pipe.transformer).values():
        Int8.of(layer)
    with accelerated(wan.pipe, recipe):
        torch.testing.assert_close(run(wan), expected, rtol=0.05, atol=0.02)
    assert all(type(layer) is Int8 for layer in lora_files.linears(wan.pipe.transformer).values())


def test_copies_have_their_own(wan, recipe):
    enable(wan.pipe, recipe)
    expected = run(wan)
    copies = copy.deepcopy(wan.pipe.transformer), pickle.loads(pickle.dumps(wan.pipe.transformer))
    disable(wan.pipe)
    untouched, original = run(wan), wan.pipe.transformer
    for one in copies:
        wan.pipe.transformer = one
        assert torch.equal(run(wan), expected)
        disable(wan.pipe)
        assert torch.equal(run(wan), untouched)
    wan.pipe.transformer = original


def test_compiled_code_is_compiled_again_and_found_again(wan, recipe):
    torch.compiler.reset()
    counter = CompileCounter()
    untouched = run(wan)
    wan.pipe.transformer.blocks[1].compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(run(wan), untouched)
    counts, plain = [counter.frame_count], wan.make()
    with accelerated(plain, recipe):
        expected = run(wan, plain)
    for again in range(2):
        with accelerated(wan.pipe, PATTERN):
            run(wan)
        with accelerated(wan.pipe, recipe):
            torch.testing.assert_close(run(wan), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run(wan), untouched)
        counts.append(counter.frame_count)
        assert counts[-1] == counts[1], again
    torch.compiler.reset()


def test_plans_count_it(tmp_path):
    """2 x tokens x rank x (in + out) for each layer, and the layer's own would be 2 x tokens x in x out."""
    config = of_model("tiny-wan")
    transformer, size = config.transformer(), {"size": (64, 64), "frames": 5, "steps": 4}
    folder = lora_files.save(transformer, tmp_path / "tuned")
    recipe = Recipe(Neighborhood((2, 3, 3)), adapter=folder)
    with_it, without = (
        plan(recipe, model="tiny-wan", **size),
        plan(recipe.attention, model="tiny-wan", **size),
    )
    assert with_it.flops == without.flops
    assert with_it.step.ideal < without.step.ideal
    tokens, width = 2 * 8 * 8, transformer.config.num_attention_heads * transformer.config.attention_head_dim
    layers = lora_files.linears(transformer)
    more = sum(2 * tokens * lora_files.RANK * (x.in_features + x.out_features) for x in layers.values())
    assert all(x.in_features == width for x in layers.values())
    assert any(f"{more / with_it.flops.total:.2%} more FLOPs" in note for note in with_it.notes)
