"""Guidance inside ordinary pipelines, against the formula itself.

`dit_accel.guidance` tests show that `applied` is the perturbed model; here it makes the reference's `ptb`.
"""

import copy
import dataclasses
from contextlib import nullcontext
from unittest import mock

import accelerate
import pytest
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchHeunDiscreteScheduler
from diffusers.hooks import apply_group_offloading

from dit_accel.errors import UnavailableError
from dit_accel.guidance import HeadPerturbation
from dit_accel.patterns import Clear, Dense, Neighborhood
from dit_accel.pipelines import family_of
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, disable, enable
from dit_accel.summary import summary

FAMILIES = pytest.mark.parametrize("family", ["flux", "sd3", "wan", "hunyuan", "hunyuan15"])
W, G = 2.5, 3.0
GUIDANCE = HeadPerturbation({(1, 1): 1.0, (2, 0): 0.5}, scale=W)


@pytest.fixture
def case(family, request):
    return request.getfixturevalue(family)


def sparse(pipe):
    image = family_of(pipe.transformer).name in ("flux", "sd3")
    return Clear(3) if image else Neighborhood((3, 3, 3))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


class Formula:
    """A pipeline without guidance whose scheduler gets uncond + g (cond - uncond) + w (cond - ptb).

    The transformer's calls of a step are those that the pipeline makes: cond, then uncond; or [uncond, cond]
    in one batch.
    """

    def __init__(self, case, guidance=GUIDANCE, pattern=None, scale=lambda step: 1.0, make=None):
        self.guidance, self.scale, self.step, self.calls = guidance, scale, 0, []
        self.pipe, self.twin = (case.make(**(make or {})) for _ in range(2))
        if pattern is not None:
            for pipe in (self.pipe, self.twin):
                enable(pipe, pattern)
        self.pipe.transformer.register_forward_pre_hook(self._record, with_kwargs=True, prepend=True)
        self.pipe.transformer.register_forward_hook(self._record_output)
        self.batched = family_of(self.pipe.transformer).name == "sd3"

    def _record(self, module, args, kwargs):
        self.calls.append((kwargs,))

    def _record_output(self, module, args, output):
        self.calls[-1] += (output[0],)

    def run(self, case, **run):
        scheduler = self.pipe.scheduler
        original = scheduler.step
        scheduler.step = lambda prediction, *args, **kwargs: original(
            self._guided(prediction), *args, **kwargs
        )
        return case.run(self.pipe, **run)

    def _guided(self, prediction):
        (kwargs, cond), *others = self.calls
        self.calls = []
        g = self.scale(self.step)
        uncond = cond
        if g > 1 and self.batched:
            half = len(cond) // 2
            uncond, cond = cond.chunk(2)
            kwargs = {k: x[half:] if torch.is_tensor(x) else x for k, x in kwargs.items()}
        elif g > 1:
            uncond = others[0][1]
        strength = self.guidance.strength_at(self.step, self.total)
        self.step += 1
        guided = uncond + g * (cond - uncond)
        close(prediction, guided)
        if not strength:
            return guided
        constant = HeadPerturbation({head: u * strength for head, u in self.guidance.heads.items()})
        with constant.applied(self.twin.transformer):
            perturbed = self.twin.transformer(**kwargs)[0]
        return guided + self.guidance.scale * (cond - perturbed)

    @property
    def total(self):
        return len(self.pipe.scheduler.timesteps)


@FAMILIES
@pytest.mark.parametrize("cfg", [1.0, G], ids=["plain", "cfg"])
@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_is_the_formula(case, attention, cfg):
    pipe = case.make()
    pattern = sparse(pipe) if attention == "sparse" else None
    expected = Formula(case, pattern=pattern, scale=lambda step: cfg).run(case, cfg=cfg, batch=2)
    plain = case.run(pipe, cfg=cfg, batch=2)
    enable(pipe, Recipe(pattern or Dense(), order="hilbert", guidance=GUIDANCE))
    close(case.run(pipe, cfg=cfg, batch=2), expected)
    assert not torch.allclose(expected, plain, atol=1e-2)
    disable(pipe)
    assert torch.equal(case.run(pipe, cfg=cfg, batch=2), plain)


@FAMILIES
def test_no_scale_is_bit_identical_to_no_guidance(case):
    pipe = case.make()
    for pattern in (Dense(), sparse(pipe)):
        with accelerated(pipe, Recipe(pattern)):
            expected = case.run(pipe, cfg=G)
        for guidance in (HeadPerturbation([(1, 0)], scale=0), HeadPerturbation([(1, 0)], strength=0.0)):
            with accelerated(pipe, Recipe(pattern, guidance=guidance)) as handle:
                assert torch.equal(case.run(pipe, cfg=G), expected)
                assert handle.stats()["guidance"]["transformer"]["forwards"] == 0


@FAMILIES
def test_steps_and_schedule(case):
    guidance = HeadPerturbation({(1, 1): 1.0}, scale=W, strength=lambda done: 1 - done, start=0.25, stop=0.75)
    pipe = case.make()
    expected = Formula(case, guidance, scale=lambda step: G).run(case, cfg=G, steps=4)
    handle = enable(pipe, Recipe(Dense(), guidance=guidance))
    close(case.run(pipe, cfg=G, steps=4), expected)
    assert handle.stats()["guidance"]["transformer"]["forwards"] == 2


@pytest.mark.parametrize(
    ("family", "scales"), [("sd3", (G, 5.0, 2.0)), ("wan", (G, 1.0, 1.0))], ids=["sd3", "wan-to-none"]
)
def test_cfg_scale_changed_mid_run(case, scales):
    """By a step callback; Wan's only hears of CFG being switched off."""

    def change(pipe, step, timestep, kwargs):
        pipe._guidance_scale = scales[min(step + 1, 2)]
        return {}

    run = {"cfg": G, "steps": 3, "callback_on_step_end": change}
    expected = Formula(case, scale=scales.__getitem__).run(case, **run)
    pipe = case.make()
    enable(pipe, Recipe(Dense(), guidance=GUIDANCE))
    close(case.run(pipe, **run), expected)


@FAMILIES
@pytest.mark.parametrize("first", [0, 1, 2])
def test_blocks_before_the_first_perturbed_one_run_once(case, first):
    pipe = case.make()
    handle = enable(pipe, Recipe(Dense(), guidance=HeadPerturbation([(2, 0), (first, 1)], scale=W)))
    blocks = [b for part in family_of(pipe.transformer).blocks(pipe.transformer) for b in part]
    counts = [0] * len(blocks)

    def count(index):
        def hook(module, args):
            counts[index] += 1

        return hook

    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(count(index))
    case.run(pipe, steps=2, cfg=G)
    calls = 2 if family_of(pipe.transformer).name == "sd3" else 4
    assert counts == [calls + 2 * (index >= first) for index in range(len(blocks))]
    ran = {"forwards": 2, "blocks": 2 * (len(blocks) - first), "cost": 1 - first / len(blocks)}
    assert handle.stats()["guidance"]["transformer"] == pytest.approx(ran)
    assert f"costs {ran['cost']:.2f} of a conditional forward more; latest run: 2" in str(summary(pipe))
    assert f"guidance perturbs {1 + (first == 2)} heads" in str(summary(pipe))


@pytest.mark.parametrize("family", ["flux", "wan", "hunyuan", "hunyuan15"])
def test_pipelines_that_name_no_branches(case):
    """The first call of each step is the conditional one."""
    pipe = case.make()
    enable(pipe, Recipe(Dense(), guidance=GUIDANCE))
    expected = case.run(pipe, cfg=G)
    pipe.transformer.cache_context = lambda name, **kwargs: nullcontext()
    assert torch.equal(case.run(pipe, cfg=G), expected)


@pytest.mark.parametrize("family", ["flux", "wan", "hunyuan", "hunyuan15"])
def test_branches_of_a_bare_transformer(case):
    """`cache_context` names them: both get the same w (cond - ptb), and only cond has a second forward."""
    pipe, inputs = case.make(), case.inputs(case.make())
    transformer, other = pipe.transformer, {**inputs, "hidden_states": inputs["hidden_states"] * 2}
    with torch.no_grad():
        cond, uncond = (transformer(**x)[0] for x in (inputs, other))
        with GUIDANCE.applied(transformer):
            shift = W * (cond - transformer(**inputs)[0])
        handle = enable(transformer, Recipe(Dense(), guidance=GUIDANCE))
        with transformer.cache_context("cond"):
            close(transformer(**inputs)[0], cond + shift)
        with transformer.cache_context("uncond"):
            close(transformer(**other)[0], uncond + shift)
        assert handle.stats()["guidance"]["transformer"]["forwards"] == 1
        handle = enable(transformer, Recipe(Dense(), guidance=GUIDANCE))
        message = "unconditional branch of this step was called before the conditional one"
        with transformer.cache_context("uncond"), pytest.raises(RuntimeError, match=message):
            transformer(**other)
        disable(transformer)
        assert torch.equal(transformer(**inputs)[0], cond)


@pytest.mark.parametrize("family", ["flux", "sd3", "hunyuan"])
def test_is_formed_in_fp32(case):
    inputs = {
        name: x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x
        for name, x in case.inputs(case.make()).items()
    }
    transformer = case.pipe.transformer.bfloat16()
    with torch.no_grad():
        cond = transformer(**inputs)[0]
        with GUIDANCE.applied(transformer):
            perturbed = transformer(**inputs)[0]
        enable(transformer, Recipe(Dense(), guidance=GUIDANCE))
        exact = cond.float() + W * (cond.float() - perturbed.float())
        assert torch.equal(transformer(**inputs)[0], exact.bfloat16())
    assert not torch.equal(cond + W * (cond - perturbed), exact.bfloat16())


@pytest.mark.parametrize("family", ["wan"])
def test_second_order_scheduler(case):
    def heun(pipe):
        pipe.scheduler = FlowMatchHeunDiscreteScheduler()
        return pipe

    formula = Formula(case, scale=lambda step: G)
    heun(formula.pipe)
    pipe = heun(case.make())
    enable(pipe, Recipe(Dense(), guidance=GUIDANCE))
    close(case.run(pipe, cfg=G), formula.run(case, cfg=G))


@pytest.mark.parametrize("family", ["sd3"])
def test_skip_layer_guidance_adds_to_it(case):
    """SD3's call with `skip_layers` is no branch: its own term comes out as without ours."""
    skip = {"cfg": G, "steps": 2, "skip_guidance_layers": [1], "skip_layer_guidance_start": -1.0}
    skip["skip_layer_guidance_stop"] = 1.0
    pipe, seen = case.make(), []
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda prediction, *args, **kwargs: (
        seen.append(prediction),
        step(prediction, *args, **kwargs),
    )[1]
    case.run(pipe, **skip)
    with_skip = seen.pop(0)
    seen.clear()
    case.run(pipe, cfg=G, steps=2)
    without = seen.pop(0)
    enable(pipe, Recipe(Dense(), guidance=GUIDANCE))
    seen.clear()
    case.run(pipe, cfg=G, steps=2)
    guided = seen.pop(0)
    seen.clear()
    case.run(pipe, **skip)
    both = seen.pop(0)
    assert (with_skip - without).abs().max() > 1e-3
    close(both - guided, with_skip - without)


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_caches_are_refused(case):
    pipe = case.make()
    enable(pipe, Recipe(Dense(), guidance=GUIDANCE))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(UnavailableError, match=r"does not work with caches .*\.disable_cache\(\)"):
        case.run(pipe)
    pipe.transformer.disable_cache()
    case.run(pipe)


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_at_dense_steps_as_well(case):
    pipe = case.make()
    recipe = Recipe(sparse(pipe), dense_steps=1, order="hilbert")
    expected = Formula(case, pattern=recipe, scale=lambda step: G).run(case, cfg=G)
    handle = enable(pipe, dataclasses.replace(recipe, guidance=GUIDANCE))
    close(case.run(pipe, cfg=G), expected)
    assert handle.stats()["dense_steps"] == [0]


@pytest.mark.parametrize("family", ["wan"])
def test_two_transformers_are_one(case):
    pipe = case.make(two=True)
    handle = enable(pipe, Recipe(Dense(), guidance=GUIDANCE))
    for _ in range(2):
        guided = case.run(pipe, steps=6, cfg=G)
        forwards = [stats["forwards"] for stats in handle.stats()["guidance"].values()]
        assert sum(forwards) == 6
        assert min(forwards) > 0
    disable(pipe)
    assert not torch.allclose(case.run(pipe, steps=6, cfg=G), guided, atol=1e-2)


@FAMILIES
def test_copy_of_a_guided_transformer_is_its_own(case):
    pipe, inputs = case.make(), case.inputs(case.make())
    with torch.no_grad():
        plain = pipe.transformer(**inputs)[0]
        enable(pipe.transformer, Recipe(Dense(), guidance=GUIDANCE))
        guided = pipe.transformer(**inputs)[0]
        twin = copy.deepcopy(pipe.transformer)
        disable(pipe)
        assert torch.equal(twin(**inputs)[0], guided)
        assert torch.equal(pipe.transformer(**inputs)[0], plain)
        for weight in pipe.transformer.parameters():
            weight.zero_()
        assert torch.equal(twin(**inputs)[0], guided)
        disable(twin)
        assert torch.equal(twin(**inputs)[0], plain)
    assert "cache_context" not in vars(twin) | vars(pipe.transformer)


def offloaded_in_sequence(pipe):
    accelerate.cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))


def offloaded_in_groups(pipe):
    apply_group_offloading(
        pipe.transformer,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
    )


@FAMILIES
@pytest.mark.parametrize("offload", [offloaded_in_sequence, offloaded_in_groups])
def test_offloaded(case, offload):
    pipe = case.make()
    recipe = Recipe(sparse(pipe), order="hilbert", guidance=GUIDANCE)
    with accelerated(pipe, recipe):
        expected = case.run(pipe, cfg=G)
    offload(pipe)
    with accelerated(pipe, recipe):
        close(case.run(pipe, cfg=G), expected)


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_compiled_blocks(case):
    pipe = case.make()
    recipe = Recipe(sparse(pipe), order="hilbert", guidance=GUIDANCE)
    with accelerated(pipe, recipe):
        expected = case.run(pipe, cfg=G)
    torch._dynamo.reset()
    with accelerated(pipe, recipe):
        pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
        close(case.run(pipe, cfg=G), expected)


@FAMILIES
def test_second_run_is_identical_even_after_an_aborted_one(case):
    pipe = case.make()
    enable(pipe, Recipe(sparse(pipe), guidance=GUIDANCE))
    expected = case.run(pipe, cfg=G)
    with (
        pytest.raises(InterruptedError),
        mock.patch.object(pipe.scheduler, "step", side_effect=InterruptedError),
    ):
        case.run(pipe, cfg=G)
    assert torch.equal(case.run(pipe, cfg=G), expected)
