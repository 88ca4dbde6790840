"""The bundled models with untrained weights: they are built, called, trained and saved as the real ones."""

import pytest
import torch

from dit_accel.pipelines import load
from dit_accel.pipelines.tiny import INFO
from dit_accel.pipelines.tiny.adapters import adapter
from dit_accel.pipelines.tiny.evaluate import generate
from dit_accel.pipelines.tiny.flow import Flow, PositionProbe, TrainingSize
from dit_accel.pipelines.tiny.models import weights_dir
from dit_accel.pipelines.tiny.text_encoders import start_from
from dit_accel.pipelines.tiny.train import export
from dit_accel.pipelines.tiny.word_tokenizers import chat_tokenizer
from dit_accel.training_loop import Draw

PROMPT = "a fox at the top left on a blue plain background"


def build(name: str):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = INFO[name].build()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, name: str, **options):
    """Two steps at the native size, or what ``options`` say."""
    frames, height, width = INFO[name].native
    frames = frames if frames > 1 else None
    return generate(pipe, [PROMPT], [0], **{"size": (height, width), "frames": frames, "steps": 2, **options})


def flow(pipe, name: str, entry: TrainingSize, folder) -> tuple[Flow, PositionProbe]:
    family = adapter(INFO[name], pipe)
    position_probe = PositionProbe(family)
    return Flow(family, (entry,), folder, 0, torch.device("cpu"), position_probe), position_probe


@pytest.fixture(params=INFO)
def model(request):
    return request.param, build(request.param)


def test_a_pipeline_draws_at_its_native_size(model):
    name, pipe = model
    frames, height, width = INFO[name].native
    output = draw(pipe, name, guidance=INFO[name].guidance)
    assert output.shape == ((1, frames) if frames > 1 else (1,)) + (height, width, 3)
    assert output.std() > 0
    assert output.min() >= 0
    assert output.max() <= 1


def test_guidance_changes_what_is_drawn(model):
    name, pipe = model
    size = {"size": (32, 32), "frames": 5 if INFO[name].video else None}
    assert (draw(pipe, name, **size) != draw(pipe, name, guidance=3.0, **size)).any()


def test_a_training_step_reaches_transformer_and_text_encoders(model, tmp_path):
    name, pipe = model
    size = (5, 32, 32) if INFO[name].video else (1, 32, 32)
    loss, position_probe = flow(pipe, name, TrainingSize(size, 2, 4, ((0.0, 1.0),)), tmp_path)
    value = loss(Draw(0, "step"), 0.0)
    value.backward()
    assert torch.isfinite(value)
    for key, parameter in [*pipe.transformer.named_parameters(), *position_probe.named_parameters()]:
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
    for part in loss.adapter.text_encoders:
        gradients = [p.grad for p in getattr(pipe, part).parameters() if p.grad is not None]
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        assert sum(gradient.abs().sum() for gradient in gradients) > 0, part


def test_training_feeds_the_transformer_what_the_pipeline_does(model):
    """At a pipeline's second step, of three."""
    name, pipe = model
    calls = []
    hook = lambda module, arguments, named: calls.append(named)  # noqa: E731
    pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    draw(pipe, name, steps=3)
    expected = {key: value for key, value in calls[1].items() if isinstance(value, torch.Tensor)}
    # `guidance` is for distilled transformers, which these are not
    expected = {key: value for key, value in expected.items() if key != "guidance"}

    noisy, level = expected["hidden_states"], expected["timestep"]
    if INFO[name].family == "flux":
        _, height, width = INFO[name].native
        noisy = pipe._unpack_latents(noisy, height, width, pipe.vae_scale_factor)
    sigma = level if INFO[name].family == "flux" else level / pipe.scheduler.config.num_train_timesteps
    family = adapter(INFO[name], pipe)
    with torch.no_grad():
        text = family.encode_text([PROMPT], INFO[name].max_sequence_length)
        family.velocity(noisy if INFO[name].video else noisy.unsqueeze(2), sigma, text)
    actual = {key: value for key, value in calls[-1].items() if isinstance(value, torch.Tensor)}
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if key == "timestep":  # divided and multiplied by the number of training steps; whole numbers for Wan
            torch.testing.assert_close(actual[key], value.float(), rtol=1e-6, atol=0)
        else:
            assert actual[key].dtype == value.dtype, key
            assert torch.equal(actual[key], value), key


def test_exports_load_and_fit_in_twelve_megabytes(model, tmp_path):
    name, pipe = model
    export(pipe, tmp_path / name)
    files = [file for file in (tmp_path / name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12_000_000
    loaded = load(tmp_path / name)
    for part, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            weights = getattr(loaded, part).state_dict()
            assert all(
                torch.equal(value.half().float(), weights[key]) for key, value in module.state_dict().items()
            )
    template = "{}"
    if INFO[name].family == "hunyuan-video":
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

        template = DEFAULT_PROMPT_TEMPLATE["template"]
    text = template.format(PROMPT)
    assert loaded.tokenizer(text).input_ids == pipe.tokenizer(text).input_ids


@pytest.fixture
def hunyuan_video():
    return build("tiny-hunyuan-video")


def test_prompts_survive_the_template_of_hunyuan_video(hunyuan_video):
    """The pipeline crops the first 95 tokens: what is left is the prompt's words and the end mark."""
    prompts = ["blue fox", "green fox", "blue owl", ""]
    embeddings, _, mask = hunyuan_video.encode_prompt(prompts, max_sequence_length=24)
    assert embeddings.shape[:2] == mask.shape == (4, 24)
    assert mask.sum(1).tolist() == [3, 3, 3, 1]
    blue, green, owl, empty = embeddings.unbind()
    assert not torch.equal(blue[0], green[0])  # the first token left is the first word
    torch.testing.assert_close(blue[0], owl[0])  # causal: the same words before it, none after
    assert not torch.allclose(blue[1], owl[1])
    assert not torch.allclose(blue[0], empty[0])

    words = hunyuan_video.tokenizer
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    ids = words(DEFAULT_PROMPT_TEMPLATE["template"].format("A blue fox!")).input_ids
    assert words.convert_ids_to_tokens(ids[95:]) == ["a", "blue", "fox", "<|eot_id|>"]
    _, _, mask = hunyuan_video.encode_prompt(["blue " * 40], max_sequence_length=24)
    assert mask.sum() == 24  # longer prompts are cut at their end


def test_a_template_longer_than_its_crop_is_refused():
    with pytest.raises(ValueError, match="leave room for a begin mark in 2 tokens, and has 3"):
        chat_tokenizer(["one", "two", "three"], 24, "one two three", 2)


def test_latents_of_hunyuan_video_are_standard_and_decode_the_same(hunyuan_video):
    family = adapter(INFO["tiny-hunyuan-video"], hunyuan_video)
    hunyuan_video.vae.double()
    pixels = torch.rand(2, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    with torch.no_grad():
        before = family.posterior(pixels)
        decoded = family.decode(before.mean)
        axes = (0, 2, 3, 4)
        mean, std = before.mean.mean(axes), before.mean.std(axes)
        family.set_statistics(mean, std)
        after = family.posterior(pixels)
        latents = family.normalise(after.mean)
        again = family.decode(after.mean)
    torch.testing.assert_close(latents.mean(axes), torch.zeros_like(mean))
    torch.testing.assert_close(latents.std(axes), torch.ones_like(std))
    torch.testing.assert_close(after.std, before.std / std.view(-1, 1, 1, 1))
    torch.testing.assert_close(again, decoded)


def test_text_encoders_start_from_those_of_tiny_flux():
    """UMT5 is T5 with a table of distances in every layer."""
    wan, flux = INFO["tiny-wan"].build(), load("tiny-flux")
    start_from(wan.text_encoder, weights_dir("tiny-flux") / "text_encoder_2")
    ids = wan.tokenizer("a fox at the top and an owl at the bottom on a blue plain background").input_ids
    ids = torch.tensor([ids])
    with torch.no_grad():
        found, wanted = (one(ids).last_hidden_state for one in (wan.text_encoder, flux.text_encoder_2))
    assert torch.equal(found, wanted)
