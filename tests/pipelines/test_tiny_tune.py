"""Adapters tuned to a pattern, on a model of one block and a few tokens."""

import pytest
import torch

from dit_accel import accelerated
from dit_accel.errors import UnavailableError
from dit_accel.json_files import read_json
from dit_accel.patterns import ByNoise, Clear, Dense, Neighborhood
from dit_accel.pipelines.tiny.models import spec
from dit_accel.pipelines.tiny.tune import Tuning
from dit_accel.recipe.recipe import Recipe

RECIPE = Recipe(Clear(1), dense_steps=1, dense_layers={-1}, family="flux")


def model():
    """tiny-flux of one block of each kind, its weights drawn so that it predicts something."""
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = spec("tiny-flux").build()
        config = {**pipe.transformer.config, "num_layers": 1, "num_single_layers": 1}
        pipe.transformer = FluxTransformer2DModel.from_config(config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tuning(folder, recipe=RECIPE, **options):
    settings = {"pipe": model(), "size": (1, 32, 32), "steps": 4, "batch": 2, "rank": 2, "scenes": 2}
    return Tuning(
        "tiny-flux", recipe, folder / "out", folder / "run", **(settings | {"rate": 0.01} | options)
    )


def test_an_adapter_is_tuned_and_loaded(tmp_path):
    job = tuning(tmp_path, steps=12, flow_weight=0.0)
    before = {name: x.clone() for name, x in job.transformer.state_dict().items()}
    said = job.run()
    assert said["error"] < 0.9 * said["error_without"]
    assert read_json(tmp_path / "out" / "made_by.json") == said
    assert all(torch.equal(x, before[name]) for name, x in job.transformer.state_dict().items())
    recipe = Recipe(RECIPE.attention, dense_steps=1, adapter=tmp_path / "out")
    (part,) = recipe.adapter.parts.values()
    assert all(
        name.startswith("transformer_blocks.0.attn.") for name in part.layers
    )  # the last layer is dense
    with accelerated(job.pipe, recipe) as handle:
        assert len(handle.bindings["transformer"].adapted.modules) == len(part.layers) == 8


def test_a_resumed_run_ends_with_the_same_adapter(tmp_path):
    tuning(tmp_path / "whole").run()
    tuning(tmp_path / "parts").run(until=2)
    assert not (tmp_path / "parts" / "out").exists()
    tuning(tmp_path / "parts", resume=True).run()
    one, other = ((tmp_path / way / "out").iterdir() for way in ("whole", "parts"))
    assert {p.name: p.read_bytes() for p in one} == {p.name: p.read_bytes() for p in other}
    with pytest.raises(ValueError, match="another `rank`, 2, not 3; use the same settings, or give another"):
        tuning(tmp_path / "parts", resume=True, rank=3)


def test_steps_that_are_dense_are_tuned_dense(tmp_path):
    job = tuning(tmp_path)
    latents = torch.zeros(1, 4, 1, 8, 8)
    assert job._dense(torch.tensor([1.0, 0.99, 0.5, 0.0]), latents).tolist() == [True, True, False, False]
    by_noise = tuning(tmp_path, Recipe(Clear(1), dense_steps={"sigma": (0.4, 0.6)}))
    assert by_noise._dense(torch.tensor([1.0, 0.5]), latents).tolist() == [False, True]


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        (Recipe(Clear(1), quantization="int8"), UnavailableError, "quantized attention has no gradients"),
        (Recipe(Clear(1), backend="flex"), UnavailableError, "on a CPU has no backward pass"),
        (Recipe(ByNoise({0.5: Dense(), 0: Clear(1)})), ValueError, "change with the noise level"),
        (Recipe(Dense()), ValueError, "there is nothing to tune"),
        (Recipe(Neighborhood((3, 3, 3)), family="wan"), ValueError, "is for the family 'wan'"),
    ],
)
def test_what_cannot_be_tuned_is_refused(tmp_path, recipe, error, message):
    with pytest.raises(error, match=message):
        tuning(tmp_path, recipe)
    assert not (tmp_path / "run").exists()
