"""The parts of the loss, noise levels and shares of processes."""

from types import SimpleNamespace

import distillations
import pytest
import torch
from torch import nn

from dit_accel import Recipe, accelerated
from dit_accel.distillation.steps import Steps, is_dense, noise_level
from dit_accel.patterns import Clear
from dit_accel.training_loop import Draw

LEVELS = (1.0, 0.8, 0.4)


@pytest.mark.parametrize(("place", "level"), [(0, 1), (1 / 6, 0.9), (1 / 3, 0.8), (0.5, 0.6), (5 / 6, 0.2)])
def test_noise_levels_are_spread_as_the_steps_of_a_run(place, level):
    assert noise_level(place, LEVELS, "scheduler") == pytest.approx(level)
    assert noise_level(place, LEVELS, "uniform") == 1 - place


def test_levels_belong_to_the_nearest_step():
    first = Recipe(Clear(2), dense_steps=1)
    assert [is_dense(x, LEVELS, first) for x in (1.0, 0.91, 0.89, 0.1)] == [True, True, False, False]
    last = Recipe(Clear(2), dense_steps={-1})
    assert [is_dense(x, LEVELS, last) for x in (1.0, 0.7, 0.59, 0.0)] == [False, False, True, True]
    by_noise = Recipe(Clear(2), dense_steps={"sigma": (0.4, 0.6)})
    assert [is_dense(x, LEVELS, by_noise) for x in (0.7, 0.6, 0.3)] == [False, True, False]


def perturbed(job):
    """What is trained, as after some steps."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in job.student.weights.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return job


def outputs_of(transformer, layers, run):
    """Attention outputs of single-stream blocks, as the modules return them."""
    found, hooks = [], []
    for layer in layers:
        hooks.append(layer.register_forward_hook(lambda module, args, output: found.append(output)))
    out = run()
    for hook in hooks:
        hook.remove()
    return out, found


def mse(a, b):
    return (a.double() - b.double()).square().mean().item()


@pytest.mark.parametrize("rank", [2, None], ids=["lora", "whole"])
def test_parts_of_the_loss_are_their_formulas(flux, tmp_path, rank):
    """Against the pipeline's transformer, and the recipe with the adapter as users load it."""
    recipe, transformer = distillations.POOLED, flux.pipe.transformer
    job = perturbed(distillations.distillation(flux.pipe, "flux", tmp_path, recipe, rank=rank, batch=1))
    job.student.save(tmp_path / "out", {})
    draw = Draw(0, "one step")
    with job.student.enabled():
        found = job.steps.train(draw)
    job.close()
    rng = Draw(0, "one step").rng
    index, _, place = rng.randrange(2), rng.random(), rng.random()
    noise = Draw(0, "noise", rng.random())
    sample = job.steps.samples[index]
    level = noise_level(place, sample.levels, "scheduler")
    assert not is_dense(level, sample.levels, recipe)
    eps = noise.normal(sample.latents.shape)
    inputs = {**sample.inputs, "hidden_states": (1 - level) * sample.latents + level * eps}
    inputs["timestep"] = torch.tensor([level])

    assert [*job.student.taps.layers] == ["single.1"]  # none has a flat index divisible by 4

    def run():
        with torch.no_grad():
            return transformer(**inputs, return_dict=False)[0]

    tapped = list(job.student.taps.layers.values())
    right, theirs = outputs_of(transformer, tapped, run)
    exact = Recipe(recipe.attention, order="raster", block_size=(16, 16), adapter=tmp_path / "out")
    with accelerated(flux.pipe, exact):
        own, ours = outputs_of(transformer, tapped, run)
    expected = [mse(own, eps - sample.latents), mse(own, right), mse(ours[0], theirs[0])]
    assert found == pytest.approx(expected, rel=1e-3)
    assert min(found) > 1e-6


def test_gradients_are_those_of_the_weighted_sum(flux, tmp_path):
    """By a difference along the gradient."""
    job = perturbed(
        distillations.distillation(flux.pipe, "flux", tmp_path, batch=2, attention=2.0, at_once=2)
    )
    parameters, weights = list(job.student.weights.parameters()), torch.tensor([1.0, 0.5, 2.0])

    def loss() -> float:
        for parameter in parameters:
            parameter.grad = None
        with job.student.enabled():
            return float(torch.tensor(job.steps.train(Draw("same"))) @ weights)

    loss()
    gradients = [p.grad.clone() for p in parameters]
    length = sum(g.square().sum() for g in gradients).sqrt().item()
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter += sign * 0.02 / length * gradient
        values.append(loss())
    job.close()
    assert (values[0] - values[1]) / 0.04 == pytest.approx(length, rel=0.05)


@pytest.mark.parametrize("name", ["flux", "sd3", "hunyuan"])
def test_outputs_are_compared_in_the_models_own_order(families, tmp_path, name):
    """With a pattern that covers everything nothing is left of the distance, whatever the token order."""
    pipe = families[name].make()
    recipe = Recipe(Clear(100), order="tile", block_size=(16, 16))
    layers = list(distillations.distillation(pipe, name, tmp_path / "a", recipe).student.layers)
    job = distillations.distillation(pipe, name, tmp_path / "b", recipe, taps=layers)
    with job.student.enabled():
        parts = job.steps.train(Draw("same"))
        moved = job.student._handle.bindings["transformer"].geometry.permutation
    job.close()
    assert moved is not None
    assert parts[1] < 1e-8
    assert parts[2] < 1e-8


def test_processes_share_a_batch(flux, tmp_path, monkeypatch):
    """Their gradients and parts add up to those of one process."""
    monkeypatch.setattr(Steps, "_summed", lambda self, totals: totals.tolist())
    job = perturbed(distillations.distillation(flux.pipe, "flux", tmp_path, batch=4))
    parameters, found = list(job.student.weights.parameters()), []
    for states in ([(0, 1)], [(0, 2), (1, 2)]):
        for parameter in parameters:
            parameter.grad = None
        parts = torch.zeros(3)
        for index, count in states:
            job.steps.state = SimpleNamespace(process_index=index, num_processes=count)
            with job.student.enabled():
                parts += torch.tensor(job.steps.train(Draw("same")))
        found.append((parts, [p.grad.clone() for p in parameters]))
    job.close()
    (one, alone), (two, shared) = found
    assert torch.allclose(one, two, rtol=1e-5)
    for a, b in zip(alone, shared, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


def test_what_trains_follows_from_the_pattern(sd3, tmp_path):
    job = distillations.distillation(sd3.pipe, "sd3", tmp_path)
    names = {name.partition(".attn.")[2] for name in job.student.part.layers}
    assert names == {"to_q", "to_k", "to_v", "to_out.0"}
    assert len(job.student.part.layers) == 12
    own = distillations.distillation(sd3.pipe, "sd3", tmp_path / "own", train=("to_q", "add_q_proj"))
    assert len(own.student.part.layers) == 6
    assert isinstance(own.student.weights, nn.Module)
    own.close()
    job.close()
