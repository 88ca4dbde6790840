"""Whole weights and pooling weights of an adapter in a transformer, and out of it again."""

import copy
import pickle
from unittest import mock

import lora_files
import pytest
import torch
from left_behind import state_of
from safetensors.torch import save_file
from torch import nn

from dit_accel import UnavailableError, accelerated, disable, enable, summary
from dit_accel.attention.pooled import Patches
from dit_accel.patterns import Clear, SparseLinear
from dit_accel.pipelines import family_of
from dit_accel.recipe.recipe import Recipe

PATTERN = Clear(2, downsample=3)


def tensors_of(transformer, seed: int = 5) -> tuple[dict, dict]:
    """Weights and pooling weights as CLEAR's checkpoints name them."""
    generator = torch.Generator().manual_seed(seed)
    weights, pooling = {}, {}
    for name, own in lora_files.linears(transformer).items():
        if "add_" not in name:
            for kind, x in own.named_parameters():
                weights[f"{name}.{kind}"] = x + 0.1 * torch.randn(x.shape, generator=generator)
    places = {module: name for name, module in transformer.named_modules()}
    for layer in family_of(transformer).layers(transformer).values():
        shape = (1, 1, 1, 3, 1, 3, 1)
        pooling[f"{places[layer]}.processor.spatial_weight"] = torch.rand(shape, generator=generator)
    return weights, pooling


@pytest.fixture
def file(flux, tmp_path):
    weights, pooling = tensors_of(flux.pipe.transformer)
    save_file(weights | pooling, tmp_path / "clear_local_2_down_3.safetensors")
    return tmp_path / "clear_local_2_down_3.safetensors"


def run(flux, pipe=None):
    return flux.run(pipe or flux.pipe, grid=(5, 7), steps=1)


def by_hand(flux, adapted=True):
    """The weights in the model itself, and the pooling weights given to one layer after the other."""
    pipe = flux.make()
    weights, pooling = tensors_of(pipe.transformer)
    pipe.transformer.load_state_dict(weights, strict=False)
    pool, each = Patches.pool, iter([x.view(3, 3) for x in pooling.values() for _ in "kv"])
    with (
        mock.patch.object(Patches, "pool", lambda self, x, weights: pool(self, x, next(each))),
        accelerated(pipe, PATTERN),
    ):
        return run(flux, pipe)


def test_loaded_by_enable_and_unloaded_by_disable(flux, file):
    transformer = flux.pipe.transformer
    before, weights = state_of(transformer), {k: v.clone() for k, v in transformer.state_dict().items()}
    untouched = run(flux)
    with accelerated(flux.pipe, Recipe(PATTERN, adapter=file)):
        assert torch.allclose(run(flux), by_hand(flux), atol=1e-5)
        assert transformer.state_dict().keys() == weights.keys()
        assert "pooling weights of 4 layers" in str(summary(flux.pipe))
    assert state_of(transformer) == before
    assert all(torch.equal(x, weights[k]) for k, x in transformer.state_dict().items())
    assert torch.equal(run(flux), untouched)


def test_lora_of_the_users_is_added(flux, file):
    lora_files.load(flux.pipe.transformer, "mine")
    with accelerated(flux.pipe, Recipe(PATTERN, adapter=file)):
        with_it = run(flux)
    for part in flux.pipe.transformer.modules():
        if hasattr(part, "set_scale"):
            part.set_scale("mine", 0.0)
    with accelerated(flux.pipe, Recipe(PATTERN, adapter=file)):
        assert torch.allclose(run(flux), by_hand(flux), atol=1e-5)
    assert not torch.allclose(with_it, by_hand(flux), atol=1e-3)


def test_copies_have_their_own(flux, file):
    enable(flux.pipe, Recipe(PATTERN, adapter=file))
    expected, original = run(flux), flux.pipe.transformer
    copies = copy.deepcopy(original), pickle.loads(pickle.dumps(original))
    disable(flux.pipe)
    untouched = run(flux)
    for one in copies:
        flux.pipe.transformer = one
        assert torch.equal(run(flux), expected)
        disable(flux.pipe)
        assert torch.equal(run(flux), untouched)


def test_what_does_not_fit_is_refused(flux, file):
    before = state_of(flux.pipe.transformer)
    for pattern, message in (
        (
            Clear(2),
            r"has pooling weights, which no layer of this recipe takes; use `Clear\(radius, downsample=3\)`",
        ),
        (
            Clear(2, downsample=4),
            r"takes pooling weights of 4 x 4, and adapter .* of 3 x 3 for it",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            enable(flux.pipe, Recipe(pattern, adapter=file))
    weights, pooling = tensors_of(flux.pipe.transformer)
    save_file(weights | dict([*pooling.items()][1:]), file)
    with pytest.raises(ValueError, match=r"double.0 takes pooling weights of 3 x 3, and .* has none for it"):
        enable(flux.pipe, Recipe(PATTERN, adapter=file))
    with accelerated(flux.pipe, Recipe({"single": PATTERN, "double.1": PATTERN}, adapter=file)):
        pass  # more than is needed is no error
    save_file({k.replace("_blocks.0", "_blocks.9"): v for k, v in weights.items()}, file)
    with pytest.raises(ValueError, match=r"a weight of .*_blocks\.9\..*, which this .* does not have"):
        enable(flux.pipe, Recipe(PATTERN, adapter=file))
    save_file({k: v for k, v in weights.items() if not k.endswith("bias")}, file)
    with pytest.raises(ValueError, match="has no bias there, and a bias in this model"):
        enable(flux.pipe, Recipe(PATTERN, adapter=file))
    save_file(weights, file)
    layer = flux.pipe.transformer.transformer_blocks[0].attn.to_q
    layer.forward = lambda x: nn.Linear.forward(layer, x)
    with pytest.raises(UnavailableError, match="whose `forward` something has replaced"):
        enable(flux.pipe, Recipe(PATTERN, adapter=file))
    del layer.forward
    assert state_of(flux.pipe.transformer) == before


def test_projections_of_sparse_linear_attention(wan, tmp_path):
    """Those of TurboWan's names act where the pattern takes them, and are gone with it."""
    transformer, pattern = wan.pipe.transformer, SparseLinear(0.3, "all", block_size=(16, 16))
    before, untouched = state_of(transformer), wan.run(wan.pipe, steps=1)
    with accelerated(wan.pipe, pattern):
        plain = wan.run(wan.pipe, steps=1)
    key, dim = "self_attn.attn_op.local_attn.proj_l", transformer.config.attention_head_dim
    blocks = range(len(transformer.blocks))

    def saved(scale: float, size: int = dim, names=("weight", "bias")):
        shapes = {"weight": (size, size), "bias": (size,)}
        tensors = {
            f"blocks.{n}.{key}.{name}": torch.full(shapes[name], scale) for n in blocks for name in names
        }
        file = tmp_path / f"{scale} {size} {len(names)}.safetensors"
        save_file(tensors, file)
        return Recipe(pattern, adapter=file)

    with accelerated(wan.pipe, saved(0.0)):
        torch.testing.assert_close(wan.run(wan.pipe, steps=1), plain)
    with accelerated(wan.pipe, saved(0.1)):
        assert not torch.allclose(wan.run(wan.pipe, steps=1), plain, atol=1e-4)
        said = str(summary(wan.pipe))
        assert f"projections of linear attention of {len(blocks)} layers" in said
        assert "where an adapter brings its projection" in said
    assert state_of(transformer) == before
    assert torch.equal(wan.run(wan.pipe, steps=1), untouched)
    for recipe, message in (
        (
            saved(0.1, dim + 1),
            rf"takes projections of linear attention of {dim} x {dim}, and .* of {dim + 1} x",
        ),
        (saved(0.1, names=("weight",)), "it was made for another pattern"),
        (
            Recipe(Clear(2), adapter=saved(0.1).adapter.path),
            r"no layer of this recipe takes; use `SparseLinear",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            enable(wan.pipe, recipe)
