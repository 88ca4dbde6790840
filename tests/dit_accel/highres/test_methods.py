"""Each method: its passes, what it makes of predictions against the formula, and a picture from each."""

import math

import numpy as np
import pytest
import torch

import dit_accel
from dit_accel import Recipe
from dit_accel.attention.transformer_call import TransformerCall
from dit_accel.errors import UnavailableError
from dit_accel.highres import METHODS, ClearWindows, Flow, Growing, Projected, Rotary, Shifted, generate
from dit_accel.highres.low_pass import butterworth, haar
from dit_accel.highres.method import Before, Job
from dit_accel.highres.native import Native, Size
from dit_accel.highres.proportional import proportional
from dit_accel.highres.schedule import Part
from dit_accel.patterns import Clear, ShiftedWindow
from dit_accel.pipelines import load

PROMPT = "a fox at the top left on a blue striped background"


@pytest.fixture(scope="module")
def tiny_flux():
    pipe = load("tiny-flux")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe, steps=None, **options):
    count = lambda p, i, t, v: steps.append((i, float(t))) or v  # noqa: E731
    return generate(
        pipe,
        PROMPT,
        width=96,
        height=80,
        num_inference_steps=4,
        max_sequence_length=24,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=None if steps is None else count,
        **options,
    ).images


@pytest.mark.parametrize("method", METHODS)
def test_every_method_draws_and_leaves_no_trace(tiny_flux, method):
    before = [module.processor for module in dit_accel.pipelines.family_of(tiny_flux.transformer).layers(
        tiny_flux.transformer).values()]  # fmt: skip
    steps = []
    result = picture(tiny_flux, steps, method=method)
    assert result.shape == (1, 80, 96, 3)
    assert np.isfinite(result).all()
    assert result.std() > 0.01
    assert len(steps) == {"direct": 4, "growing": 4, "windows": 4, "projected": 8}.get(method, 6)
    after = dit_accel.pipelines.family_of(tiny_flux.transformer).layers(tiny_flux.transformer)
    assert [module.processor for module in after.values()] == before
    assert not tiny_flux.transformer.pos_embed._forward_hooks


def job(**changes):
    tools = {"native": Native(None, Size(64, 64), (8, 8), 1, False, False), "base": Size(64, 64)}
    tools |= {"target": Size(128, 96), "steps": 10, "first": 3, "shift": 3.0, "native_shift": 2.0}
    return Job(**{**tools, **changes})


def test_windows():
    assert ClearWindows(5).pattern() == Clear(5)
    assert Shifted((3, 2), seed=4).pattern() == ShiftedWindow((3, 2), seed=4)
    with pytest.raises(ValueError, match="`radius` must be a positive number"):
        ClearWindows(-1).pattern()
    with pytest.raises(ValueError, match="`windows` must be 2 integers"):
        Shifted((0, 2))


def test_passes_of_growing():
    (first, second) = Growing().passes(job())
    assert (first.size, first.part) == (Size(64, 64), Part(10, 0, 3, 2.0))
    assert (second.size, second.part) == (Size(128, 96), Part(10, 3, 10, 2.0))
    sizes = [
        (one.size.width, one.size.height, one.part.first, one.part.last) for one in Growing(2).passes(job())
    ]
    assert sizes == [(64, 64, 0, 3), (96, 80, 3, 7), (128, 96, 7, 10)]
    with pytest.raises(ValueError, match="`strength` must leave steps at native size and 1 or more above"):
        Growing().passes(job(first=0))


def test_growing_runs_its_schedule_once(tiny_flux):
    steps = []
    picture(tiny_flux, steps, method="growing", strength=0.5)
    levels = [t for _, t in steps]
    assert len(levels) == 4
    assert levels == sorted(levels, reverse=True)


def test_a_part_that_stops_early_ends_with_the_clean_estimate(tiny_flux):
    from dit_accel import latents
    from dit_accel.highres.schedule import scheduled

    seen = []

    def note(v, x, level, step, steps):
        seen.append((v, x, level, step, steps))
        return v

    unpack = latents.packing(tiny_flux, 64, 64)
    with scheduled(tiny_flux, Part(6, 0, 2), note, unpack) as extra:
        out = tiny_flux(
            PROMPT, height=64, width=64, num_inference_steps=6, output_type="latent", max_sequence_length=24,
            generator=torch.Generator().manual_seed(0), **extra,
        ).images  # fmt: skip
    v, x, level, step, steps = seen[-1]
    assert (len(seen), step, steps) == (2, 1, 2)
    assert torch.allclose(unpack(out)[0], x - level * v, atol=1e-5)


# -- predictions ---------------------------------------------------------------------------------------------


def tensors(*shape, count=3):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(2, 4, 6, 8), (1, 4, 3, 5, 7)], ids=["picture", "odd-video"])
def test_haar(shape):
    x = tensors(*shape, count=1)[0]
    low = haar(x)
    for row in range(0, shape[-2], 2):
        for column in range(0, shape[-1], 2):
            part = (..., slice(row, row + 2), slice(column, column + 2))
            mean = x[part].mean((-2, -1), keepdim=True)
            assert torch.allclose(low[part], mean.expand_as(x[part]))
    assert torch.allclose(haar(x, 4), x.mean((-2, -1), keepdim=True).expand_as(x))


def test_butterworth():
    x = tensors(1, 2, 6, 8, count=1)[0]
    weight = torch.zeros(6, 8, dtype=torch.float64)
    for y in range(6):
        for z in range(8):
            distance = (2 * y / 6 - 1) ** 2 + (2 * z / 8 - 1) ** 2
            weight[(y - 3) % 6, (z - 4) % 8] = 1 / (1 + (distance / 0.2**2) ** 4)
    wanted = torch.fft.ifft2(torch.fft.fft2(x) * weight).real
    assert torch.allclose(butterworth(x, 0.2), wanted)
    assert torch.allclose(butterworth(x, 0.2).mean((-2, -1)), x.mean((-2, -1)))


@pytest.mark.parametrize("schedule", ["cosine_decay", "cosine_shift", "constant"])
def test_projected_flow(schedule):
    v, x, ref = tensors(1, 4, 6, 8)
    on_step = Projected(schedule).on_step(Before(ref, [], ref, []), Part(10))
    for step, t in ((0, 1.0), (3, 0.6), (9, 0.1)):
        towards = -(ref - x) / (t + 1e-6)
        c = 1 if schedule == "constant" else (1 + math.cos(math.pi * step / 10)) / 2
        wanted = v + c * (haar(towards) - haar(v))
        if schedule == "cosine_shift":
            wanted = v + c * (towards - v) + (1 - c) * (haar(towards) - haar(v))
        assert torch.allclose(on_step(v, x, t, step, 10), wanted)


def test_flow_aligned_guidance():
    method, part = Flow(0.8, 0.5, 0.3), Part(10, 4)
    estimates = list(tensors(1, 4, 3, 4, count=10))
    on_step = method.on_step(Before(None, estimates, None, []), part)
    before = None
    for i in range(3):
        v, x = tensors(1, 4, 6, 8, count=2) + i
        t, weight = 0.9 - 0.1 * i, (6 - i) / 6
        ref = torch.nn.functional.interpolate(estimates[4 + i], (6, 8), mode="bicubic")
        clean = x - t * v
        clean = clean + 0.8 * weight * (butterworth(ref, 0.3) - butterworth(clean, 0.3))
        wanted, v_ref = (x - clean) / (t + 1e-6), (x - ref) / (t + 1e-6)
        if before:
            wanted = wanted + 0.5 * weight * (before[0] + v_ref - before[1] - wanted)
        assert torch.allclose(on_step(v, x, t, i, 6), wanted)
        before = (wanted, v_ref)


def test_flow_needs_its_native_pass(tiny_flux, tmp_path):
    with pytest.raises(ValueError, match="leave out `base`"):
        picture(tiny_flux, method="flow", base=torch.rand(1, 3, 8, 8))
    path = tmp_path / "base.safetensors"
    first = picture(tiny_flux, method="flow", keep=path)
    steps = []
    assert np.array_equal(picture(tiny_flux, steps, method="flow", keep=path), first)
    assert len(steps) == 2


def test_bad_options():
    with pytest.raises(ValueError, match="`schedule` must be one of"):
        Projected("linear")
    with pytest.raises(ValueError, match="`level` must be a positive integer"):
        Projected(level=0)
    with pytest.raises(ValueError, match="`alpha` must be a positive number"):
        Flow(alpha=-1)
    with pytest.raises(ValueError, match="`enlargements` must be a positive integer"):
        Growing(0)


# -- positions and scale -------------------------------------------------------------------------------------


def test_options_of_every_method(tiny_flux):
    plain = picture(tiny_flux, method="upscaled")
    for changes in ({"rotary": "ntk"}, {"rotary": Rotary("dype")}, {"proportional": True}):
        assert not np.array_equal(picture(tiny_flux, method="upscaled", **changes), plain)
    own = picture(tiny_flux, method="clear")
    assert not np.array_equal(picture(tiny_flux, method="clear", rotary=None), own)
    assert not np.array_equal(picture(tiny_flux, method="clear", proportional=False), own)
    with pytest.raises(ValueError, match="has a scale of attention of its own"):
        picture(tiny_flux, method="swim", proportional=True)
    with pytest.raises(ValueError, match="`rotary` must be one of ntk, yarn, dype, got 'pi'"):
        picture(tiny_flux, rotary="pi")


@pytest.mark.parametrize("name", ["flux", "sd3", "hunyuan", "wan"])
@pytest.mark.parametrize("pattern", [None, Clear(2)], ids=["dense", "sparse"])
def test_proportional_attention(name, pattern, families):
    """Against the model with all of q scaled, by its own processors."""
    family = families[name]
    pipe = family.make()
    plain = family.run(pipe)
    if pattern:
        dit_accel.enable(pipe, Recipe(pattern))
    with proportional(pipe, 12):
        ours = family.run(pipe)
    dit_accel.enable(pipe, Recipe(pattern or Clear(99)))
    attend = TransformerCall.attend

    def scaled(self, layer, q, k, v, dense, scale=None):
        layout = self.layouts[layer]
        factor = math.sqrt(math.log(layout.seq_len) / math.log(12 + layout.text_len))
        return attend(self, layer, q * factor, k, v, dense, scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformerCall, "attend", scaled)
        wanted = family.run(pipe)
    assert torch.allclose(ours, wanted, atol=5e-6)
    assert not torch.allclose(ours, plain, atol=1e-5)


def test_proportional_attention_and_dense_steps(flux):
    dit_accel.enable(flux.pipe, Recipe(Clear(2), dense_steps=1))
    with pytest.raises(UnavailableError, match="use dense_steps=0"), proportional(flux.pipe, 12):
        pass
