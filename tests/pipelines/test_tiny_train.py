import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dit_accel.pipelines.tiny import flow
from dit_accel.pipelines.tiny.adapters import adapter
from dit_accel.pipelines.tiny.flow import (
    Flow,
    PositionProbe,
    TrainingSize,
    balanced,
    in_a_row,
    kept_tokens,
    standing_for,
)
from dit_accel.pipelines.tiny.models import SPECS, spec
from dit_accel.pipelines.tiny.train import CURRICULA, Training
from dit_accel.training_loop import Draw, Loop, Stage

SIZES = {
    "tiny-flux": (1, 32, 32),
    "tiny-sd3": (1, 32, 32),
    "tiny-wan": (5, 32, 32),
    "tiny-hunyuan-video": (5, 32, 32),
}


@pytest.fixture(autouse=True)
def _few_scenes_to_measure(monkeypatch):
    monkeypatch.setattr(flow, "MEASURED", 2)


@pytest.fixture(autouse=True)
def _one_iteration_of_muon(monkeypatch):
    """Of five, which are in bfloat16, that many CPUs have no instructions for."""
    monkeypatch.setattr(torch.optim, "Muon", partial(torch.optim.Muon, ns_steps=1))


def short_curriculum(name: str, steps: int):
    curriculum = CURRICULA[name]
    return replace(
        curriculum,
        autoencoder="tiny-flux" if name == "tiny-sd3" else replace(curriculum.autoencoder, steps=1),
        crops=1,
        flow=replace(curriculum.flow, steps=steps, warmup=1),
        sizes=(TrainingSize(SIZES[name], 2, 4, ((0.0, 1.0),)),),
        decoder=curriculum.decoder and replace(curriculum.decoder, steps=1),
        clips={9: 1},
    )


def training(name: str, folder, resume: bool = False, steps: int = 3) -> Training:
    curriculum = short_curriculum(name, steps)
    return Training(name, folder / "run", folder / "out", resume=resume, curriculum=curriculum)


def trained(run: Training) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, module in run.adapter.trained.items()
        for key, value in module.state_dict().items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(name, tmp_path):
    whole = training(name, tmp_path / "whole")
    whole.run()
    training(name, tmp_path / "parts").run(until=1)
    rest = training(name, tmp_path / "parts", resume=True)
    assert rest.run().step == 3
    expected, actual = trained(whole), trained(rest)
    assert expected.keys() == actual.keys()
    for key, value in expected.items():
        assert torch.equal(value, actual[key]), key


@pytest.mark.slow
def test_training_leaves_a_pipeline_folder_that_loads(tmp_path):
    from diffusers import FluxPipeline

    training("tiny-flux", tmp_path, steps=1).run()
    pipe = FluxPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red circle", height=32, width=48, num_inference_steps=1, output_type="np").images
    assert image.shape == (1, 32, 48, 3)
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".partial", ".old")]


@pytest.mark.slow
def test_the_last_stage_can_start_from_given_weights(tmp_path):
    first = training("tiny-wan", tmp_path / "first", steps=1)
    first.run()
    curriculum = short_curriculum("tiny-wan", 0)
    second = Training(
        "tiny-wan", tmp_path / "run", tmp_path / "out", curriculum=curriculum, init=tmp_path / "first" / "out"
    )
    second.run()
    for kind in ("transformer", "vae", "text_encoder"):
        (one,), (other,) = ((tmp_path / place / kind).glob("*.safetensors") for place in ("first/out", "out"))
        assert one.read_bytes() == other.read_bytes()
    saved = json.loads((tmp_path / "out/tokenizer/tokenizer.json").read_text())
    assert saved["padding"] is saved["truncation"] is None
    settings = json.loads((tmp_path / "out/tokenizer/tokenizer_config.json").read_text())
    assert not settings.keys() & {"is_local", "local_files_only", "name_or_path"}, "where it came from"


def test_position_probe_reads_places_on_the_canvas():
    landmark = nn.Identity()
    family = SimpleNamespace(width=3, landmark=landmark, visual=lambda output: output)
    position_probe = PositionProbe(family)
    nn.init.eye_(position_probe.read.weight)
    landmark(torch.tensor([[[0.0, y, x] for y in (-0.5, 0.5) for x in (-0.75, -0.25, 0.25, 0.75)]]))
    latents = torch.zeros(1, 4, 1, 4, 8)
    assert position_probe(latents) == 0
    landmark(torch.zeros(1, 8, 3))
    assert position_probe(latents) > 0.1


def test_objects_weigh_half_of_the_loss_whatever_their_size():
    near = torch.zeros(2, 1, 1, 8, 8)
    near[0, ..., :2, :2], near[1, ..., :4] = 1, 1
    object_only, rest_only = near.expand(-1, 3, -1, -1, -1), (1 - near).expand(-1, 3, -1, -1, -1)
    assert balanced(object_only, near) == pytest.approx(0.5)
    assert balanced(rest_only, near) == pytest.approx(0.5)
    assert balanced(torch.ones(2, 3, 1, 8, 8), near) == pytest.approx(1)


@pytest.mark.parametrize("name", SPECS)
def test_a_row_of_all_tokens_is_worth_the_canvas(name):
    """Tokens in a row, in any order, that keep their positions come out as they do on the canvas."""
    torch.manual_seed(0)
    pipe = spec(name).build()
    for weight in pipe.transformer.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.05)
    family, channels = adapter(spec(name), pipe), pipe.vae.config.get("latent_channels") or 8
    latents, level = torch.randn(1, channels, 5 if spec(name).video else 1, 8, 12), torch.tensor([0.5])
    with torch.no_grad():
        text = family.encode_text(["a fox at the top"], 24)
        expected = family.velocity(latents, level, text)
        kept = torch.randperm(expected[0, 0].numel() // 4)
        with family.placed(latents.shape, kept):
            actual = family.velocity(in_a_row(latents, kept), level, text)
        assert torch.equal(family.velocity(latents, level, text), expected)
    assert (actual - in_a_row(expected, kept)).abs().max() < 1e-5 < expected.std()


def test_some_tokens_are_those_of_objects_and_a_few_others():
    near = torch.zeros(2, 1, 3, 16, 16)
    near[0, :, :, :4, :4] = near[1, :, 1, 8:, 8:] = 1
    every = torch.zeros(3, 8, 8, dtype=torch.bool).flatten()
    kept, numbers = kept_tokens(Draw(0), near, 100)
    every[kept] = True
    every = every.view(3, 8, 8)
    assert (numbers[kept % 64 == 9] == 1).all()  # in row and column 1
    assert numbers.max() == pytest.approx(12.5)
    assert every[:, :2, :2].all()
    assert every[1, 4:, 4:].all()
    assert 0 < every[0, 2:].float().mean() < 0.3
    some, numbers = kept_tokens(Draw(0), near, 5)
    assert len(some) < every.sum()
    assert (numbers[some % 64 == 9] == 3).all()  # the one frame of three


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_tokens_weigh_as_many_as_they_stand_for(text_first, masked):
    q, k, v = torch.randn(3, 1, 2, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    numbers = torch.tensor([1, 3, 1, 5])
    image = range(3, 7) if text_first else range(4)
    times = [int(numbers[image.index(at)]) if at in image else 1 for at in range(7)]
    mask = torch.ones(1, 1, 1, 7, dtype=torch.bool)
    mask[..., 0 if text_first else 6] = not masked
    repeated = torch.arange(7).repeat_interleave(torch.tensor(times))
    shared = [x[:, :, repeated] for x in (k, v)]
    expected = F.scaled_dot_product_attention(q, *shared, attn_mask=mask[..., repeated])
    with standing_for(numbers.double(), text_first):
        actual = F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask if masked else None)
        across = F.scaled_dot_product_attention(q, k[:, :, :5], v[:, :, :5])
    assert torch.allclose(actual, expected)
    assert torch.equal(across, F.scaled_dot_product_attention(q, k[:, :, :5], v[:, :, :5]))


def test_training_on_some_tokens_learns(tmp_path):
    pipe = spec("tiny-flux").build()
    family = adapter(spec("tiny-flux"), pipe)
    probe = PositionProbe(family)
    entry = TrainingSize((1, 64, 64), 3, 4, ((0.0, 1.0),), tokens=30)
    loss = Flow(family, (entry,), tmp_path, 0, torch.device("cpu"), probe)
    loop = Loop(Stage("flow", 12, 3e-3, warmup=1), {**family.trained, "probe": probe}, tmp_path / "flow.pt")
    first = loss.held_out(entry.size, 4)
    loop.run(loss)
    assert loss.held_out(entry.size, 4) < 0.9 * first


def test_held_out_loss_repeats_and_follows_the_weights(tmp_path):
    pipe = spec("tiny-flux").build()
    family = adapter(spec("tiny-flux"), pipe)
    size = (1, 32, 32)
    entry = TrainingSize(size, 2, 4, ((0.0, 1.0),))
    loss = Flow(family, (entry,), tmp_path, 0, torch.device("cpu"), PositionProbe(family))
    first = loss.held_out(size, 3)
    loss(Draw(0, "step"), 0.0).backward()
    assert loss.held_out(size, 3) == first
    with torch.no_grad():
        pipe.transformer.proj_out.weight.add_(1)
    assert loss.held_out(size, 3) > first


@pytest.mark.parametrize("name", SPECS)
def test_noise_levels_move_as_in_the_sampler(name):
    """Uniform levels, shifted as in training, are the sampler's own."""
    pipe = spec(name).build()
    family = adapter(spec(name), pipe)
    frames, height, width = spec(name).demo
    latents = torch.zeros(1, 1, (frames - 1) // 4 + 1, height // 4, width // 4)
    shift = family.shift(latents)
    # SD3's pipeline leaves the levels to the scheduler, which ends them next to 0 before it shifts them.
    uniform = torch.linspace(1, 1 / 1000 if name == "tiny-sd3" else 1 / 20, 20)
    expected = shift * uniform / (1 + (shift - 1) * uniform)
    levels = {"sigmas": uniform.tolist()}
    if name == "tiny-wan":
        levels = {"num_inference_steps": 20}
    elif name in ("tiny-flux", "tiny-sd3"):
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        config, tokens = pipe.scheduler.config, height * width // 64
        lengths = (config.base_image_seq_len, config.max_image_seq_len)
        levels["mu"] = calculate_shift(tokens, *lengths, config.base_shift, config.max_shift)
    pipe.scheduler.set_timesteps(**levels)
    # UniPC starts a thousandth below 1 and spaces its levels accordingly.
    assert torch.allclose(pipe.scheduler.sigmas[:20].float(), expected, atol=2e-2)


def test_learning_rate_rises_stays_and_falls():
    stage = Stage("any", steps=1000, rate=1.0, warmup=100, decay=0.3)
    assert stage.factor(0) == pytest.approx(0.01)
    assert stage.factor(100) == stage.factor(699) == 1
    assert stage.factor(850) == pytest.approx(0.55)
    assert stage.factor(1000) == pytest.approx(0.1)


def test_averages_are_swapped_in_and_out(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    loop = Loop(Stage("any", steps=5, rate=0.1, warmup=1), {"model": model}, tmp_path / "any.pt")
    loop.run(lambda draw, progress: model(draw.normal((4, 2))).square().mean())
    kept = model.weight.clone()
    with loop.averaged():
        assert torch.equal(model.weight, loop.average[0])
        assert not torch.equal(model.weight, kept)
    assert torch.equal(model.weight, kept)


def test_minutes_end_a_run_early_and_keep_its_checkpoint(tmp_path):
    model = nn.Linear(2, 1)
    loop = Loop(Stage("any", steps=5, rate=0.1), {"model": model}, tmp_path / "any.pt")
    loop.run(lambda draw, progress: model(draw.normal((4, 2))).square().mean(), minutes=0)
    assert not loop.done
    assert (tmp_path / "any.pt").exists()


def test_draws_depend_on_every_part_of_their_key():
    first = Draw(0, "flow", 1)
    assert torch.equal(first.normal((3,)), Draw(0, "flow", 1).normal((3,)))
    for other in (Draw(1, "flow", 1), Draw(0, "vae", 1), Draw(0, "flow", 2)):
        assert not torch.equal(Draw(0, "flow", 1).normal((3,)), other.normal((3,)))


def test_weights_change_with_progress():
    entry = TrainingSize((1, 64, 64), 1, 1, ((0.2, 0.5), (0.6, 0.1)))
    assert [entry.weight(progress) for progress in (0.0, 0.2, 0.5, 0.6, 1.0)] == [0.0, 0.5, 0.5, 0.1, 0.1]


@pytest.mark.parametrize("name", SPECS)
def test_plans_end_on_the_demo_size_and_always_have_something_to_train_on(name):
    curriculum = CURRICULA[name]
    assert any(entry.size == SPECS[name].demo and entry.weight(1.0) > 0 for entry in curriculum.sizes)
    assert all(sum(entry.weight(step / 100) for entry in curriculum.sizes) > 0 for step in range(101))
