"""What is done on a GPU: real shapes under real presets, every launch, and nothing twice."""

from collections import Counter

import pytest
import torch

from dit_accel.evals.gpu_bench import cases, launches, schedule, steps, worker
from dit_accel.evals.gpu_bench.peers import PROVIDERS
from dit_accel.kernels.block_sparse import triton_configs, tuned
from dit_accel.patterns import Dense
from dit_accel.recipe.recipe import presets


@pytest.mark.parametrize("case", cases.SHAPES, ids=lambda case: case.title)
def test_masks_are_those_of_the_presets(case):
    pattern = presets()[case.preset].attention
    assert case.pattern == pattern
    assert 0 < case.pattern.density(case.layout) < 0.6, "it fits the geometry, and leaves something out"


def test_shapes_are_those_of_real_models():
    seen = {(c.name, c.heads, c.layout.seq_len, c.head_dim) for c in cases.SHAPES}
    flux = {(f"flux-{side}", 24, (side // 16) ** 2 + 512, 128) for side in (1024, 2048, 4096, 8192)}
    assert seen == flux | {
        ("sd3-1024", 24, 4096 + 333, 64),
        ("hunyuan-720p", 24, 33 * 45 * 80 + 256, 128),
        ("wan-14b-720p", 40, 21 * 45 * 80, 128),
        ("wan-1.3b-480p", 12, 21 * 30 * 52, 128),
    }
    assert all(isinstance(case.pattern, Dense) for case in cases.RATE)


def test_every_case_has_a_name_of_its_own():
    titles = Counter((case.name, case.preset) for case in (*cases.RATE, *cases.SHAPES))
    assert max(titles.values()) == 1


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_jobs_can_be_done_and_are_told_apart(device):
    phases = schedule.of(device)
    for jobs in (phases.checks, phases.shapes, phases.backward, phases.steps):
        assert max(Counter(job.name for job in jobs).values()) == 1
    for job in (*phases.checks, *phases.rate, *phases.shapes, *phases.backward, *phases.steps):
        assert job.kind in worker.KINDS
        if job.kind in ("attention", "backward"):
            assert tuple(job.arguments["case"]) in cases.BY_NAME
            assert job.arguments["provider"] in PROVIDERS
        if job.kind == "step":
            assert job.arguments["step"] in steps.BY_NAME


def test_dense_yardsticks_come_before_ours_on_every_case():
    names = [job.arguments["provider"] for job in schedule.of("cuda").shapes]
    for number, name in enumerate(names):
        if name == "triton":
            assert tuple(names[number - 2 : number]) == ("sdpa-cudnn", "sdpa-flash")
    assert names.count("triton") == len(cases.SHAPES)
    assert names.count("flex") == schedule.SHAPES_WITH_PEERS
    rate = [job.arguments.get("provider") for job in schedule.of("cuda").rate]
    for other in ("triton-tma", "triton-gluon", "triton-tma-int8", "triton-tma-int8-fp8", "triton-tail"):
        assert names.count(other) == schedule.SHAPES_WITH_PEERS
        assert rate.count(other) == (0 if other.endswith("tail") else rate.count("triton"))


def test_backward_passes_are_checked_and_timed_beside_flex():
    phases = schedule.of("cuda")
    checked = [job.arguments for job in phases.checks if job.kind == "check gradients"]
    assert {(each["dtype"], dim) for each in checked for dim in each["head_dims"]} >= {
        ("bf16", 128), ("fp16", 128), ("fp32", 128),
    }  # fmt: skip
    names = [job.arguments["provider"] for job in phases.backward]
    assert names[:5] == ["sdpa-cudnn", "sdpa-flash", "triton", "triton-tma", "flex"]
    assert names.count("triton") == len(cases.RATE) + schedule.SHAPES_WITH_PEERS
    assert names.count("triton-tail") == schedule.SHAPES_WITH_PEERS, "with full blocks there is no tail"
    assert {each["backend"] for each in checked} == {None, "triton-tma"}


def test_every_launch_is_checked_and_one_that_a_table_may_name():
    jobs = [job for job in schedule.of("cuda").checks if "launch" in job.arguments]
    grids = [*launches.GRID, *launches.BACKWARD_GRID]
    assert [tuple(job.arguments["launch"]) for job in jobs] == grids
    assert [job.kind for job in jobs] == ["check launch"] * 57 + ["check backward launch"] * 15
    assert len({launches.describe(launch) for launch in grids}) == len(grids)
    for launch in grids:
        assert all(value in tuned.RANGES[name] for name, value in launch._asdict().items())
    kinds = Counter(launch.kind for launch in launches.GRID)
    assert set(kinds) == {
        (kernel, keys, format, "forward")
        for kernel in tuned.KERNELS
        for keys in (64, 128)
        for format in tuned.RANGES["format"]
        if (kernel, keys) != ("gluon", 128) and (kernel, keys, format) != ("pointer", 128, "int8")
        and (format != "int8-fp8" or (kernel != "gluon" and keys == 64))
    }  # fmt: skip
    ways = {(launch.ping_pong, launch.persistent) for launch in launches.GRID if launch.kernel == "gluon"}
    assert len(ways) == 4
    assert {(launch.part, launch.kernel) for launch in launches.BACKWARD_GRID} == {
        (part, kernel) for part in tuned.BACKWARD_PARTS for kernel in tuned.BACKWARD_KERNELS
    }
    for part in tuned.BACKWARD_PARTS:
        (job,) = schedule.grid(cases.SHAPES[0], [launches.BACKWARD_GRID[0]._replace(part=part)])
        assert job.kind == "backward launch"
        assert part in job.name


def test_the_kernels_own_launches_are_among_those_tried():
    for head_dim in cases.TUNING:
        for capability in ((8, 0), (9, 0), (10, 0), (12, 0)):
            assert triton_configs.untuned(head_dim, torch.bfloat16, capability) in launches.GRID
            for part in tuned.BACKWARD_PARTS:
                for kernel in ("pointer", "tma") if 9 <= capability[0] <= 10 else ("pointer",):
                    asked = part, kernel, head_dim, torch.bfloat16, capability
                    assert triton_configs.untuned_backward(*asked) in launches.BACKWARD_GRID
    assert all(case.head_dim == head_dim for head_dim, chosen in cases.TUNING.items() for case in chosen)


def test_the_schedule_in_words_names_all_of_it():
    text = schedule.describe()
    for name in (*(case.name for case in cases.SHAPES), *(step.name for step in steps.STEPS), "sdpa-cudnn"):
        assert name in text
    assert "57 launches with head_dim 128" in text
    assert "15 of the backward pass on the same" in text


@pytest.mark.parametrize("step", steps.STEPS, ids=lambda step: step.name)
def test_steps_are_of_sizes_the_models_take_and_have_recipes(step):
    model = step.model
    tokens = model.layout(model.grid(model.transformer(), step.size)).seq_len
    assert 4000 < tokens < 120_000
    recipes = steps.recipes_for(step)
    assert len(recipes) >= 2
    assert all(recipe.family == model.family for recipe in recipes.values())
