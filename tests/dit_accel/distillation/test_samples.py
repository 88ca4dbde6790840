"""Samples: generated and kept, resumed, of folders, and what is captured of a pipeline's calls."""

import distillations
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import dit_accel
from dit_accel import latents, media
from dit_accel.distillation import capture, samples
from dit_accel.distillation.folders import read_folder
from dit_accel.distillation.samples import Sample
from dit_accel.pipelines import family_of
from dit_accel.pipelines.tiny.models import spec


def of_folder(folder):
    """Checksums of samples, by their files; the order of the fields in a file is not fixed."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found[path.name] = file.metadata()["sha256"]
    return found


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "hunyuan"])
def test_a_sample_is_what_the_pipeline_ends_with_and_what_it_gave(families, tmp_path, name):
    """Its inputs are those of a conditional sample of the first call."""
    tools, pipe = families[name], families[name].make()
    job = distillations.distillation(pipe, name, tmp_path)
    job.close()
    sample, (prompt, *_) = job.steps.samples[0], distillations.prompts(name)
    noise = samples.Draw(0, "sample", 0).generator
    result = pipe(**distillations.call(name), **prompt, generator=noise, output_type="latent")
    assert torch.equal(sample.latents, result.frames if hasattr(result, "frames") else result.images)
    assert torch.equal(sample.inputs["encoder_hidden_states"], prompt["prompt_embeds"])
    assert sample.levels[0] == 1
    assert list(sample.levels) == sorted(sample.levels, reverse=True)
    seen = tools.inputs(pipe)
    known = {n for n, x in seen.items() if isinstance(x, torch.Tensor)}
    assert {"hidden_states", "timestep", *sample.inputs} == known


def test_making_them_goes_on_where_it_was_stopped(flux, tmp_path, monkeypatch):
    whole = distillations.distillation(flux.pipe, "flux", tmp_path / "whole")
    whole.close()
    run, calls = capture.run, []

    def counted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(*arguments)

    monkeypatch.setattr(capture, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        distillations.distillation(flux.pipe, "flux", tmp_path / "parts")
    assert len(list((tmp_path / "parts" / "state" / "samples").glob("0*"))) == 2
    distillations.distillation(flux.pipe, "flux", tmp_path / "parts").close()
    assert len(calls) == 4
    assert of_folder(tmp_path / "parts/state/samples") == of_folder(tmp_path / "whole/state/samples")


def test_they_are_of_one_kind_and_undamaged(flux, tmp_path):
    job = distillations.distillation(flux.pipe, "flux", tmp_path)
    with pytest.raises(ValueError, match="was begun with another `samples`, 3, not 4"):
        distillations.distillation(flux.pipe, "flux", tmp_path, samples=4)
    (tmp_path / "state" / "distillation.json").unlink()
    with pytest.raises(ValueError, match="were made with another `seed`, 0, not 1"):
        distillations.distillation(flux.pipe, "flux", tmp_path, seed=1)
    path = job.steps.samples.path(0)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        job.steps.samples[0]
    job.close()


def test_more_samples_than_prompts_have_other_noise(flux, tmp_path):
    job = distillations.distillation(flux.pipe, "flux", tmp_path, samples=4)
    job.close()
    first, again = job.steps.samples[0], job.steps.samples[3]
    assert torch.equal(first.inputs["encoder_hidden_states"], again.inputs["encoder_hidden_states"])
    assert not torch.allclose(first.latents, again.latents)


def test_what_is_enabled_is_off_while_samples_are_made(flux, tmp_path):
    dense = distillations.distillation(flux.pipe, "flux", tmp_path / "dense")
    dense.close()
    with dit_accel.accelerated(flux.pipe, distillations.RECIPE):
        distillations.distillation(flux.pipe, "flux", tmp_path / "sparse").close()
        assert dit_accel.handle_of(flux.pipe).recipe == distillations.RECIPE
    assert of_folder(tmp_path / "dense/state/samples") == of_folder(tmp_path / "sparse/state/samples")


def test_what_training_cannot_repeat_is_refused(flux):
    family, call = (
        family_of(flux.pipe.transformer),
        {**distillations.call("flux"), **distillations.prompts("flux")[0]},
    )
    with pytest.raises(dit_accel.UnavailableError, match="passes `joint_attention_kwargs`="):
        capture.run(flux.pipe, family, {**call, "joint_attention_kwargs": {"scale": 1.0}}, False)
    with pytest.raises(dit_accel.UnavailableError, match="ran 2 samples for one prompt"):
        capture.run(flux.pipe, family, {**call, "num_images_per_prompt": 2}, False)
    with pytest.raises(dit_accel.UnavailableError, match="needs a run of a flow from noise level 1"):
        capture.run(flux.pipe, family, {**call, "sigmas": [0.5, 0.2]}, False)
    stopped = capture.run(flux.pipe, family, call, False)
    assert stopped.latents is None


# -- folders -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_flux():
    """Of random weights, with text encoders and an autoencoder."""
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = spec("tiny-flux").build()
        config = {**pipe.transformer.config, "num_layers": 1, "num_single_layers": 1}
        pipe.transformer = FluxTransformer2DModel.from_config(config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(folder, size=(32, 32), count=3):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        shape = (size[1], size[0], 3)
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a fox\n number {number}\n")
    return folder


def encoded(pipe, source, folder, call=None, empty=True, count=None):
    from accelerate import PartialState

    call = {"num_inference_steps": 2, "max_sequence_length": 24, **(call or {})}
    options = (read_folder(source, count), call, empty, folder, PartialState(), False)
    return samples.encoded(pipe, family_of(pipe.transformer), *options)


def test_pictures_of_a_folder_are_encoded_with_their_captions(tiny_flux, tmp_path):
    found = encoded(tiny_flux, pictures(tmp_path / "pictures"), tmp_path / "samples")
    assert len(found) == 3
    picture = torch.from_numpy(media.load(tmp_path / "pictures" / "1.png")).permute(0, 3, 1, 2)[None] / 255
    with torch.no_grad():
        expected = latents.packed(latents.encoded(tiny_flux, picture, False))
        text = tiny_flux.encode_prompt("a fox number 1", None, max_sequence_length=24)
    sample, empty = found[1], found.empty
    assert torch.equal(sample.latents, expected)
    assert torch.equal(sample.inputs["encoder_hidden_states"], text[0])
    assert torch.equal(sample.inputs["pooled_projections"], text[1])
    mixed = sample.with_text_of(empty, family_of(tiny_flux.transformer))
    assert torch.equal(mixed.latents, sample.latents)
    assert torch.equal(mixed.inputs["img_ids"], sample.inputs["img_ids"])
    assert not torch.equal(mixed.inputs["encoder_hidden_states"], text[0])
    assert mixed.shapes == sample.shapes


def test_a_folder_is_distilled_from(tiny_flux, tmp_path):
    source = pictures(tmp_path / "pictures", size=(40, 48), count=4)
    lines = [f'{{"file_name": "{n}.png", "text": "a fox {n}"}}' for n in range(3)]
    (source / "metadata.jsonl").write_text("\n".join(lines))
    call = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 24}
    options = {**distillations.SMALL, "empty": 0.5, "steps": 2}
    said = dit_accel.distill(tiny_flux, distillations.RECIPE, source, tmp_path / "out", call=call, **options)
    assert said["samples"] == 3
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_videos_of_a_folder(tmp_path):
    """Of 7 frames the first 5, as the autoencoder takes them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = spec("tiny-wan").build()
    pipe.set_progress_bar_config(disable=True)
    (tmp_path / "videos").mkdir()
    frames = np.zeros((7, 32, 32, 3), np.uint8)
    frames[:, 8:16, 8:16] = np.arange(7, dtype=np.uint8)[:, None, None, None] * 30
    media.save(tmp_path / "videos" / "a.gif", frames)
    (tmp_path / "videos" / "a.txt").write_text("a red circle")
    found = encoded(pipe, tmp_path / "videos", tmp_path / "samples", empty=False)[0]
    pixels = torch.from_numpy(media.load(tmp_path / "videos" / "a.gif")[:5]).permute(0, 3, 1, 2)[None] / 255
    assert torch.equal(found.latents, latents.encoded(pipe, pixels, True))
    assert found.latents.shape[2] == 2
    with pytest.raises(ValueError, match="has 7 frames, fewer than `num_frames`, 9"):
        encoded(pipe, tmp_path / "videos", tmp_path / "others", {"num_frames": 9}, empty=False)


def test_folders_that_are_refused(tiny_flux, tmp_path):
    def fails(message, call=None, count=None, folder="pictures"):
        with pytest.raises(ValueError, match=message):
            encoded(tiny_flux, tmp_path / folder, tmp_path / "samples", call, count=count)

    fails("there is no folder")
    source = pictures(tmp_path / "pictures", size=(36, 32))
    fails("is 36x32 pixels and 1 frames, which this model does not take; give a `height`")
    fails("`samples` is 4, and .* has 3 captioned files", count=4)
    (source / "1.txt").unlink()
    fails("1.png has no caption: write it into 1.txt beside it")
    for line, message in (
        ("{", "line 1 is no JSON"),
        ("\n \n{\n", "line 3 is no JSON"),
        ("\n", "has no images or videos"),
        ('{"file_name": "0.png"}', "must be an object with `file_name` and `text`"),
        ('{"file_name": "9.png", "text": "x"}', "names '9.png', and there is no such file"),
        ('{"file_name": "../x.png", "text": "x"}', "no such file in the folder"),
    ):
        (tmp_path / "x.png").write_bytes((source / "0.png").read_bytes())
        (source / "metadata.jsonl").write_text(line)
        fails(message)
    (tmp_path / "nothing").mkdir()
    fails("has no images or videos", folder="nothing")


def test_a_sample_in_a_file(tmp_path):
    inputs = {"text": torch.randn(1, 3, 4).bfloat16(), "mask": torch.ones(1, 3).long()}
    sample = Sample(torch.randn(1, 5, 2), inputs, (1.0, 0.5), (7,))
    sample.write(tmp_path / "sample.safetensors")
    read = Sample.read(tmp_path / "sample.safetensors")
    assert (read.levels, read.per_token, read.shapes) == (sample.levels, sample.per_token, sample.shapes)
    assert torch.equal(read.inputs["text"], inputs["text"])
