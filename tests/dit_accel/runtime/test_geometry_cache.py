"""What is kept from call to call serves every mode of autograd, in whichever it was made."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from dit_accel.guidance import HeadPerturbation
from dit_accel.patterns import Clear, Neighborhood, SparseVideoGen
from dit_accel.pipelines import family_of
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import enable

FAMILIES = pytest.mark.parametrize("family", ["flux", "sd3", "wan", "hunyuan"])
MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": nullcontext}
KINDS = ["plain", "guidance", "checkpoints"]


@pytest.fixture
def case(family, request):
    return request.getfixturevalue(family)


def recipe_of(family, kind):
    pattern = Clear(4) if family in ("flux", "sd3") else Neighborhood((3, 5, 3))
    heads = HeadPerturbation(heads=[(1, 0), (2, 1)], scale=2.0, kind="seg", sigma=1.0)
    return Recipe(
        pattern,
        order="hilbert",
        block_size=(16, 16),
        dense_steps={1},
        guidance=heads if kind == "guidance" else None,
    )


def gradient(transformer, inputs):
    """Of a layer's projection, in one step of training."""
    transformer.zero_grad()
    transformer(**inputs)[0].square().mean().backward()
    return next(iter(family_of(transformer).layers(transformer).values())).to_k.weight.grad.clone()


def close(actual, expected):
    """With gradients another kernel than without computes the same."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@FAMILIES
@pytest.mark.parametrize("kind", KINDS)
def test_training_after_inference(case, family, kind):
    """And inference after training, with calls of every mode between; steps go from sparse to dense."""
    transformer, inputs = case.pipe.transformer, case.inputs(case.pipe)
    if kind == "checkpoints":
        transformer.enable_gradient_checkpointing()

    def fresh():
        handle = enable(transformer, recipe_of(family, kind))
        handle.begin(3)
        return handle

    fresh()
    expected = gradient(transformer, inputs)
    with torch.no_grad():
        out = transformer(**inputs)[0]
    for modes in (("inference",), ("inference", "no_grad", "inference"), ("grad", "inference", "no_grad")):
        fresh()
        for mode in modes:
            with MODES[mode]():
                close(transformer(**inputs)[0], out)
        assert torch.equal(gradient(transformer, inputs), expected)
        with torch.inference_mode():
            close(transformer(**inputs)[0], out)
        assert torch.equal(gradient(transformer, inputs), expected)


@FAMILIES
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_inference(case, family, kind):
    """Embeddings and latents that were made in inference mode, as by a text encoder of a training loop."""
    with torch.inference_mode():
        inputs = {
            name: x.clone() if isinstance(x, torch.Tensor) else x
            for name, x in case.inputs(case.pipe).items()
        }
    handle = enable(case.pipe.transformer, recipe_of(family, kind))
    results = []
    for mode in ("inference", "no_grad", "inference"):
        handle.begin(2)
        with MODES[mode]():
            results.append(case.pipe.transformer(**inputs)[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@FAMILIES
def test_enabled_in_inference_mode(case, family):
    transformer, inputs = case.pipe.transformer, case.inputs(case.pipe)
    enable(transformer, recipe_of(family, "plain"))
    expected = gradient(transformer, inputs)
    with torch.inference_mode():
        enable(transformer, recipe_of(family, "plain"))
        transformer(**inputs)
    assert torch.equal(gradient(transformer, inputs), expected)


@pytest.mark.parametrize("family", ["wan", "hunyuan"])
def test_patterns_that_choose_by_content(case):
    transformer, inputs = case.pipe.transformer, case.inputs(case.pipe)
    pattern = SparseVideoGen(keep=0.5, block_size=16)
    enable(transformer, pattern)
    expected = gradient(transformer, inputs)
    enable(transformer, pattern)
    with torch.inference_mode():
        transformer(**inputs)
    assert torch.equal(gradient(transformer, inputs), expected)
