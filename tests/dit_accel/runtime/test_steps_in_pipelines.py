"""Sampler steps in the loops of diffusers' own pipelines, with random weights."""

import math
import threading
from collections import defaultdict
from contextlib import ExitStack

import diffusers as D
import pytest
import torch

from dit_accel import Recipe, patterns
from dit_accel.runtime.steps import StepTracker
from dit_accel.runtime.switching import accelerated

SCHEDULERS = {
    "heun": D.FlowMatchHeunDiscreteScheduler,
    "unipc": lambda: D.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    ),
    "dpm": lambda: D.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
}
NOISE = torch.Generator().manual_seed(0)
IMAGE = torch.rand(1, 3, 64, 96, generator=NOISE)
MASK = torch.ones(1, 1, 64, 96)
SIZE = {"height": 64, "width": 96}
TEXT, POOLED = torch.randn(1, 7, 16, generator=NOISE), torch.randn(1, 16, generator=NOISE)
PROMPT = {"prompt_embeds": TEXT, "negative_prompt_embeds": TEXT}
POOLED_PROMPT = {**PROMPT, "pooled_prompt_embeds": POOLED, "negative_pooled_prompt_embeds": POOLED}
VALID = {
    "prompt_attention_mask": torch.ones(1, 7).long(),
    "negative_prompt_attention_mask": torch.ones(1, 7).long(),
}


def of_images(channels: int):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": (4,) * 4, "norm_num_groups": 2, "latent_channels": channels}
    return D.AutoencoderKL(**blocks, **sizes, shift_factor=0.1).eval()


def of_wan():
    sizes = {"base_dim": 3, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return D.AutoencoderKLWan(**sizes, **statistics, temperal_downsample=[False, True, True]).eval()


def of_hunyuan():
    blocks = {"down_block_types": ("HunyuanVideoDownBlock3D",) * 4}
    blocks |= {"up_block_types": ("HunyuanVideoUpBlock3D",) * 4}
    sizes = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4}
    return D.AutoencoderKLHunyuanVideo(**blocks, **sizes, latent_channels=4).eval()


def flux(kind, config=None, **run):
    def make(families):
        pipe = families["flux"].make(**config or {})
        return rebuilt(pipe, kind, vae=of_images(4), image_encoder=None, feature_extractor=None)

    if kind is D.FluxFillPipeline:  # knows no negative prompt
        return make, {"prompt_embeds": TEXT, "pooled_prompt_embeds": POOLED, **SIZE, **run}
    return make, {"true_cfg_scale": 2.0, **SIZE, **POOLED_PROMPT, **run}


def sd3(kind, **run):
    def make(families):
        pipe = families["sd3"].make(in_channels=16, out_channels=16)
        return rebuilt(pipe, kind, vae=of_images(16))

    return make, {"guidance_scale": 2.0, **SIZE, **POOLED_PROMPT, **run}


def wan(kind, two=False, expand=False, vace=False, in_channels=4, **run):
    def make(families):
        pipe = families["wan"].make(two=two, expand_timesteps=expand, in_channels=in_channels)
        if vace:
            config = {"vace_layers": [0, 2], "vace_in_channels": 8 + 64}
            transformer = D.WanVACETransformer3DModel(**{**pipe.transformer.config, **config}).eval()
            return rebuilt(pipe, kind, transformer=transformer, vae=of_wan())
        options = {"boundary_ratio": 0.5} if two else {}
        if expand:
            options["expand_timesteps"] = True
        return rebuilt(pipe, kind, vae=of_wan(), image_encoder=None, image_processor=None, **options)

    return make, {"guidance_scale": 2.0, **SIZE, **PROMPT, **run}


def hunyuan(kind, config=None, **run):
    def make(families):
        pipe = families["hunyuan"].make(**config or {})
        return rebuilt(pipe, kind, vae=of_hunyuan(), image_processor=None)

    return make, {"true_cfg_scale": 2.0, "num_frames": 9, **SIZE, **POOLED_PROMPT, **VALID, **run}


def rebuilt(pipe, kind, **parts):
    """A pipeline of another kind around the same transformer."""
    known, asked = {**pipe.components, **parts}, kind.__init__.__annotations__
    other = kind(**{name: part for name, part in known.items() if name in asked})
    other.set_progress_bar_config(disable=True)
    return other


FILL = {"in_channels": 16 + 16 + 256, "out_channels": 16}
VIDEO = [(torch.full((64, 96, 3), 0.1 * i).numpy()) for i in range(9)]
PIPELINES = {  # how it is made and called, the share of the schedule that it runs, calls in a step
    "flux": (*flux(D.FluxPipeline), 1, 2),
    "flux img2img": (*flux(D.FluxImg2ImgPipeline, image=IMAGE, strength=0.5), 0.5, 2),
    "flux inpaint": (*flux(D.FluxInpaintPipeline, image=IMAGE, mask_image=MASK, strength=0.75), 0.75, 2),
    "flux fill": (*flux(D.FluxFillPipeline, FILL, image=IMAGE, mask_image=MASK), 1, 1),
    "flux kontext": (
        *flux(D.FluxKontextPipeline, image=IMAGE, _auto_resize=False, max_area=64 * 96), 1, 2,
    ),
    "sd3": (*sd3(D.StableDiffusion3Pipeline), 1, 1),
    "sd3 img2img": (*sd3(D.StableDiffusion3Img2ImgPipeline, image=IMAGE, strength=0.5), 0.5, 1),
    "sd3 inpaint": (
        *sd3(D.StableDiffusion3InpaintPipeline, image=IMAGE, mask_image=MASK, strength=0.25), 0.25, 1,
    ),
    "wan": (*wan(D.WanPipeline, num_frames=9), 1, 2),
    "wan of two transformers": (*wan(D.WanPipeline, two=True, num_frames=9), 1, 2),
    "wan of expanded timesteps": (*wan(D.WanPipeline, expand=True, num_frames=9), 1, 2),
    "wan i2v": (*wan(D.WanImageToVideoPipeline, in_channels=12, image=IMAGE, num_frames=9), 1, 2),
    "wan i2v of expanded timesteps": (
        *wan(D.WanImageToVideoPipeline, expand=True, image=IMAGE, num_frames=9), 1, 2,
    ),
    "wan v2v": (*wan(D.WanVideoToVideoPipeline, video=VIDEO, strength=0.5), 0.5, 2),
    "wan v2v, most": (*wan(D.WanVideoToVideoPipeline, video=VIDEO, strength=0.75), 0.75, 2),
    "wan vace": (*wan(D.WanVACEPipeline, vace=True, num_frames=9), 1, 2),
    "hunyuan": (*hunyuan(D.HunyuanVideoPipeline), 1, 2),
    "hunyuan skyreels i2v": (
        *hunyuan(
            D.HunyuanSkyreelsImageToVideoPipeline,
            {"in_channels": 8, "out_channels": 4, "guidance_embeds": True},
            image=IMAGE,
        ),
        1, 2,
    ),
    "hunyuan i2v": (
        *hunyuan(
            D.HunyuanVideoImageToVideoPipeline,
            {"in_channels": 9, "out_channels": 4, "image_condition_type": "latent_concat"},
            image=IMAGE,
        ),
        1, 2,
    ),
}  # fmt: skip


DENSE = {2: lambda n: {0, 1}, 0.3: lambda n: set(range(math.ceil(0.3 * n))), (0, -1): lambda n: {0, n - 1}}


def steps_in(pipe, dense, steps, **run):
    """(step, total) in each call of the transformers in a run, and the dense steps."""
    recipe = Recipe(patterns.SlidingTile((1, 1, 1), (1, 2, 2)), dense_steps=dense)
    seen = []
    with accelerated(pipe, recipe) as handle, ExitStack() as hooks:
        for transformer in handle.transformers:
            note = lambda *_: seen.append((handle.step, handle.total_steps))  # noqa: E731
            hooks.enter_context(transformer.register_forward_hook(note))
        generator = torch.Generator().manual_seed(0)
        pipe(**run, num_inference_steps=steps, generator=generator, output_type="latent")
    return seen, set(handle.stats()["dense_steps"])


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline(name, families):
    make, run, share, calls = PIPELINES[name]
    pipe = make(families)
    for dense, expected in DENSE.items():
        dense = set(dense) if isinstance(dense, tuple) else dense
        seen, made = steps_in(pipe, dense, 8, **run)
        total = int(8 * share)
        assert seen == [(step, total) for step in range(total) for _ in range(calls)]
        assert made == expected(total)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [("flux", None), ("flux img2img", None), ("sd3 img2img", None), ("hunyuan", None)]
    + [(name, kind) for name in ("wan of two transformers", "wan v2v") for kind in SCHEDULERS],
)
def test_dense_by_noise_level(name, scheduler, families):
    """All calls of a step alike: guidance branches, both evaluations of Heun's method, both transformers."""
    make, run, share, _ = PIPELINES[name]
    pipe = make(families)
    if scheduler is not None:
        pipe.scheduler = SCHEDULERS[scheduler]()
    _, made = steps_in(pipe, {"sigma": (0.3, 0.8)}, 8, **run)
    total = int(8 * share)
    sigmas = pipe.scheduler.sigmas[:-1].tolist()[:: pipe.scheduler.order][-total:]
    expected = {step for step, sigma in enumerate(sigmas) if 0.3 <= sigma <= 0.8}
    assert made == expected
    assert 0 < len(expected) < total


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", ["wan", "wan i2v", "wan v2v", "wan v2v, most"])
def test_other_schedulers(name, scheduler, families):
    make, run, share, calls = PIPELINES[name]
    pipe = make(families)
    pipe.scheduler = SCHEDULERS[scheduler]()
    seen, made = steps_in(pipe, {0, -1}, 8, **run)
    total = int(8 * share)
    evaluations = [step for step in range(total) for _ in range(pipe.scheduler.order)]
    if pipe.scheduler.order == 2:  # Heun's method has one evaluation in the last step
        evaluations.pop()
    assert seen == [(step, total) for step in evaluations for _ in range(calls)]
    assert made == {0, total - 1}


@pytest.mark.parametrize("stop", [0, 3, 5])
@pytest.mark.parametrize(
    ("name", "other"), [("flux", "flux img2img"), ("sd3", "sd3 inpaint"), ("wan", "wan v2v"), ("wan", "wan")]
)
def test_another_pipeline_after_an_interrupted_run(name, other, stop, families):
    """With the same transformer and a scheduler of its own, which may begin where the first one stands."""
    make, run, *_ = PIPELINES[name]
    make_other, run_other, share, calls = PIPELINES[other]
    first, generator = make(families), torch.Generator().manual_seed(0)
    scheduler = type(first.scheduler).from_config(first.scheduler.config)
    second = rebuilt(first, type(make_other(families)), scheduler=scheduler)

    def interrupt(pipe, step, timestep, inputs):
        pipe._interrupt = step == stop
        return inputs

    seen = []
    with accelerated(first, Recipe(patterns.SlidingTile((1, 1, 1), (1, 2, 2)), dense_steps=1)) as handle:
        known = {"num_inference_steps": 8, "generator": generator, "output_type": "latent"}
        first(**run, **known, callback_on_step_end=interrupt)
        assert handle.step == stop
        note = lambda *_: seen.append((handle.step, handle.total_steps))  # noqa: E731
        with handle.transformers[0].register_forward_hook(note):
            second(**run_other, **known)
    total = int(8 * share)
    assert seen == [(step, total) for step in range(total) for _ in range(calls)]
    assert handle.stats()["dense_steps"] == [0]


@pytest.mark.parametrize(
    "names", [("flux", "flux img2img"), ("wan", "wan v2v"), ("sd3", "sd3", "sd3 img2img")], ids=" and ".join
)
def test_threads(names, families):
    """Pipelines around one transformer, each with its thread and scheduler; the first is the one known."""
    pipes = [PIPELINES[names[0]][0](families)]
    for name in names[1:]:
        scheduler = type(pipes[0].scheduler).from_config(pipes[0].scheduler.config)
        pipes.append(rebuilt(pipes[0], type(PIPELINES[name][0](families)), scheduler=scheduler))
    tracker, ticks = StepTracker(pipes[0]), defaultdict(list)
    start = threading.Barrier(len(names))

    def note(module, args, kwargs):
        ticks[threading.current_thread().name].append(tracker.tick(kwargs["timestep"]))

    def work(i):
        start.wait(300)
        for steps in (4, 8 - 4 * (i > 0)):
            known = {"num_inference_steps": steps, "output_type": "latent"}
            pipes[i](**PIPELINES[names[i]][1], **known, generator=torch.Generator().manual_seed(0))

    threads = [threading.Thread(target=work, args=(i,), name=str(i)) for i in range(len(names))]
    with pipes[0].transformer.register_forward_pre_hook(note, with_kwargs=True):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, name in enumerate(names):
        _, _, share, calls = PIPELINES[name]
        totals = [int(steps * share) for steps in (4, 8 - 4 * (i > 0))]
        expected = [(step, total) for total in totals for step in range(total) for _ in range(calls)]
        assert [tick[:2] for tick in ticks[str(i)]] == expected
        assert len({tick.run for tick in ticks[str(i)]}) == 2
