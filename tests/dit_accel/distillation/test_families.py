"""Every family: what its pipelines denoise is told from the rest, and distilled to; others say why not."""

import inspect
from pathlib import Path

import pytest
import torch
from pipeline_arguments import arguments_of

import dit_accel
from dit_accel import Recipe, UnavailableError
from dit_accel.distillation import nested
from dit_accel.distillation.run import Distillation
from dit_accel.distillation.samples import Sample
from dit_accel.distillation.settings import Settings
from dit_accel.patterns import Clear
from dit_accel.pipelines import family_of
from dit_accel.recipe.adapter_parts import LowRank

RECIPE = Recipe(Clear(1.5), order="tile", block_size=(16, 16), dense_steps=0)
SMALL = {"batch": 2, "rank": 2, "rate": 0.01, "empty": 0, "flow": 0, "held_out": 1, "precision": "fp32"}
BY_LOOP = {
    "animate",
    "chrono",
    "cogvideox",
    "far",
    "helios",
    "ltx2",
    "minimaxh3",
}  # of which none is distilled
FAMILIES = (
    "flux", "chroma", "flux2", "sd3", "qwen", "zimage", "hunyuanimage", "wan", "skyreels", "hunyuan",
    "hunyuan15", "ltx", "mochi", "kandinsky5",
)  # fmt: skip
ENCODING = ("flux", "chroma", "sd3", "wan", "skyreels", "hunyuan")  # those that take folders


def embeddings(tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(seed))


def mochi(tools):
    """Its pipeline, which makes no single step, and a call of it."""
    from diffusers import MochiPipeline

    loop = tools.make()
    parts = {"vae": None, "text_encoder": None, "tokenizer": None}
    pipe = MochiPipeline(scheduler=loop.scheduler, transformer=loop.transformer, **parts)
    texts = {"prompt_embeds": embeddings(7, 1), "negative_prompt_embeds": embeddings(7, 2)}
    masks = {name.replace("embeds", "attention_mask"): torch.arange(7)[None] < 5 for name in texts}
    size = {"num_frames": 13, "height": 96, "width": 128}
    return pipe, {**texts, **masks, **size, "num_inference_steps": 4, "guidance_scale": 3.0}


def kandinsky5(tools):
    """Its pipeline, with the channels of a given image that it makes, and a call of it."""
    from diffusers import Kandinsky5T2VPipeline

    loop = tools.make(visual_cond=True)
    pipe = Kandinsky5T2VPipeline(loop.transformer, None, None, None, None, None, loop.scheduler)
    text = embeddings(7, 1)
    texts = {"prompt_embeds_qwen": text, "prompt_embeds_clip": text[:, 0]}
    texts["prompt_cu_seqlens"] = torch.tensor([0, 7])
    size = {"num_frames": 9, "height": 96, "width": 128}
    return pipe, {**texts, **size, "num_inference_steps": 2, "guidance_scale": 1.0}


def pipeline_and_call(families, name):
    """A pipeline of random weights, and arguments of its call without guidance."""
    if name in ("mochi", "kandinsky5"):
        pipe, call = {"mochi": mochi, "kandinsky5": kandinsky5}[name](families[name])
        pipe.set_progress_bar_config(disable=True)
        return pipe, call
    pipe = families[name].make()
    return pipe, arguments_of(families[name], pipe, steps=2)  # which sets guiders as well


def of_prompt(call):
    """What of a call is a prompt's."""
    return {name: value for name, value in call.items() if nested.has_tensors(value)}


def prepared(families, name, folder, **options):
    """A distillation with its samples, and its pipeline's call."""
    pipe, call = pipeline_and_call(families, name)
    prompts = [of_prompt(call)] * 3
    sizes = {key: value for key, value in call.items() if key not in prompts[0] and key != "output_type"}
    settings = Settings(**{**SMALL, **options})
    job = Distillation(pipe, RECIPE, settings, sizes, folder / "out", folder / "state", None)
    job.prepare(prompts, progress=False)
    return job, call


@pytest.mark.parametrize("name", FAMILIES)
def test_it_comes_nearer_to_its_teacher(families, tmp_path, name):
    job, _ = prepared(families, name, tmp_path, steps=8, at_once=2)
    said = job.run(progress=False, until=None)
    job.close()
    assert said["error"] < 0.99 * said["error_without"]
    recipe = Recipe(RECIPE.attention, adapter=tmp_path / "out")
    (part,) = recipe.adapter.parts.values()
    assert all(isinstance(layer, LowRank) for layer in part.layers.values())
    changed = job.student.changed
    if name != "chroma":
        assert len(part.layers) >= 2 * len(changed)  # no layer of the recipe's is left out
    dit_accel.enable(job.pipe, recipe)
    dit_accel.disable(job.pipe)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_trained_on_is_what_the_pipeline_does(families, tmp_path, name):
    """A step of its scheduler goes along the velocity that the student predicts at that noise level.

    So latents, noise levels, timesteps, the sign of predictions and all other inputs are the pipeline's own.
    """
    job, call = prepared(families, name, tmp_path, steps=1)
    pipe, family, sample = job.pipe, job.family, job.steps.samples[0]
    calls = []

    def before(module, args, kwargs):
        names = [n for n in inspect.signature(type(module).forward).parameters if n != "self"]
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        rows = family.conditional(pipe, inputs)
        calls.append(family.denoised(module, inputs)[rows].detach().clone())

    if name == "mochi":
        call = {**call, "guidance_scale": 1.0}
        del call["negative_prompt_embeds"], call["negative_prompt_attention_mask"]
    with pipe.transformer.register_forward_pre_hook(before, with_kwargs=True, prepend=True):
        pipe(**{**call, "generator": torch.Generator().manual_seed(3), "output_type": "latent"})
    at, after = calls[:2]
    (batch,) = job.steps._batches([(0, False, 0.0, run_of(at))], 1)
    assert batch.levels == [sample.levels[0]]
    inputs = batch.inputs(family, job.device, job.steps.dtype)
    inputs = family.with_denoised(inputs, at, family.timestep(inputs))
    velocity, _ = job.student.teacher(inputs, record=False)
    job.close()
    expected = at + (sample.levels[1] - sample.levels[0]) * velocity
    assert not torch.allclose(at, after, atol=1e-2)
    assert torch.allclose(after, expected, atol=2e-3, rtol=1e-3)


def run_of(latents):
    """A draw of this noise."""

    class Fixed:
        @staticmethod
        def normal(shape):
            assert tuple(shape) == tuple(latents.shape)
            return latents

    return Fixed()


@pytest.mark.parametrize("name", ["qwen", "zimage", "kandinsky5", "ltx"])
def test_a_sample_is_read_as_it_was_written(families, tmp_path, name):
    """Lists, tuples and numbers among its inputs too."""
    job, _ = prepared(families, name, tmp_path, steps=1)
    job.close()
    sample = job.steps.samples[0]
    sample.write(Path(tmp_path / "again.safetensors"))
    again = Sample.read(tmp_path / "again.safetensors")
    assert again.inputs.keys() == sample.inputs.keys()
    assert all(nested.equal(again.inputs[key], value) for key, value in sample.inputs.items())
    assert not all(isinstance(value, torch.Tensor) for value in sample.inputs.values())
    other = prepared(families, name, tmp_path / "other", steps=1)[0]
    other.close()
    mixed = sample.with_text_of(other.steps.samples[1], job.family)
    assert mixed.inputs.keys() == sample.inputs.keys()


@pytest.mark.parametrize("name", ENCODING)
def test_a_sample_takes_the_text_of_one_of_another_size(families, tmp_path, name):
    """As pictures of a folder take that of the empty prompt, which is made once."""
    pipe, call = pipeline_and_call(families, name)
    assert family_of(pipe.transformer).encodes
    text = of_prompt(call)
    sizes = {key: value for key, value in call.items() if key not in text}
    heights = [{**text, "height": height} for height in (96, 64)]
    settings = Settings(**{**SMALL, "steps": 1})
    job = Distillation(pipe, RECIPE, settings, sizes, tmp_path / "out", tmp_path / "state", None)
    job.prepare(heights, progress=False)
    sample, other = job.steps.samples[0], job.steps.samples[1]
    predicted = []
    for inputs in (sample.inputs, sample.with_text_of(other, job.family).inputs):
        given = job.family.with_denoised(dict(inputs), sample.latents, torch.full((1,), 0.5))
        predicted.append(job.student.teacher(given, record=False)[0])
    job.close()
    assert sample.latents.shape != other.latents.shape
    assert torch.equal(*predicted)  # both texts are the same


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("cogvideox", "they predict no flow"),
        ("ltx2", "they denoise sound beside the video"),
        ("minimaxh3", "they denoise sound beside the video"),
        ("animate", "they are given a character and its motion"),
        ("chrono", "they are given a picture to edit"),
        ("far", "each chunk is given those before it"),
        ("helios", "each chunk is given those before it"),
    ],
)
def test_others_say_why_not(families, tmp_path, name, why):
    pipe = families[name].make()
    family = family_of(pipe.transformer).name
    with pytest.raises(UnavailableError, match=f"the family '{family}' cannot be distilled: {why}"):
        dit_accel.distill(pipe, RECIPE, [{"prompt_embeds": embeddings(7, 1)}] * 3, tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()


def test_every_family_is_tested(families):
    assert set(FAMILIES) | BY_LOOP == set(families)


@pytest.mark.parametrize("name", ["qwen", "zimage", "hunyuanimage"])
def test_folders_are_refused_where_encoding_is_not_known(families, tmp_path, name):
    from PIL import Image

    (tmp_path / "data").mkdir()
    for number in range(2):
        Image.new("RGB", (64, 64)).save(tmp_path / "data" / f"{number}.png")
        (tmp_path / "data" / f"{number}.txt").write_text("a fox")
    pipe = families[name].make()
    with pytest.raises(UnavailableError, match="encode pictures is not known; give prompts"):
        dit_accel.distill(pipe, RECIPE, tmp_path / "data", tmp_path / "out", **{**SMALL, "held_out": 0})
