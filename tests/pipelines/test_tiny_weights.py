"""The weights that are shipped."""

import pytest
import torch

from dit_accel.pipelines.tiny import INFO, NAMES, attribute_accuracy, weights_dir
from dit_accel.pipelines.tiny.evaluate import held_out_scenes
from dit_accel.pipelines.tiny.models import spec

CLASSES = {
    "flux": "FluxPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "wan": "WanPipeline",
    "hunyuan-video": "HunyuanVideoPipeline",
}


def load(name: str):
    import diffusers

    pipe = getattr(diffusers, CLASSES[INFO[name].family]).from_pretrained(weights_dir(name))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", NAMES)
def test_weights_fit_in_twelve_megabytes(name):
    files = [file for file in weights_dir(name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12_000_000
    assert {file.suffix for file in files} == {".json", ".safetensors"}


@pytest.mark.parametrize("name", NAMES)
def test_weights_load_into_the_configuration_they_were_trained_in(name):
    pipe, fresh = load(name), spec(name).build()
    for part, module in fresh.components.items():
        if isinstance(module, torch.nn.Module):
            loaded = getattr(pipe, part)
            assert type(loaded) is type(module)
            assert {key: value.shape for key, value in loaded.state_dict().items()} == {
                key: value.shape for key, value in module.state_dict().items()
            }
            assert all(torch.isfinite(value).all() for value in loaded.state_dict().values())
            assert loaded.dtype == torch.float32
    assert pipe.tokenizer.model_max_length == fresh.tokenizer.model_max_length


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_held_out_prompts_are_drawn_as_described(name):
    info = INFO[name]
    frames, height, width = info.native
    result = attribute_accuracy(
        load(name),
        16,
        size=(height, width),
        frames=frames,
        steps=info.steps,
        guidance=info.guidance,
        progress=False,
    )
    assert result["n"] == 16
    assert result["mean"] >= 0.75, result


def test_held_out_scenes_are_fixed():
    assert held_out_scenes(4) == held_out_scenes(4) != held_out_scenes(4, seed=1)
    assert all(scene.held_out and scene.motion for scene in held_out_scenes(4, video=True))


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'tiny-sdxl'.*tiny-flux, tiny-sd3, tiny-wan, tiny-hunyuan-video"):
        weights_dir("tiny-sdxl")
