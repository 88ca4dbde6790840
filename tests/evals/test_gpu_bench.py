"""The GPU benchmark: its shapes, its arithmetic on tiny cases on the CPU, its answer without a GPU."""

from __future__ import annotations

import csv
import dataclasses
import time

import pytest
import torch
from torch.nn.attention import SDPBackend

from dit_accel import TokenLayout, UnavailableError
from dit_accel.blueprint import Blueprint
from dit_accel.evals import gpu_attention, gpu_bench, gpu_steps
from dit_accel.evals.gpu_attention import CASES, Case
from dit_accel.evals.gpu_steps import STEPS, Step
from dit_accel.evals.peers import PROVIDERS, Provider, block_sparse, sdpa
from dit_accel.evals.table import COLUMNS
from dit_accel.patterns import Clear, Dense, Neighborhood
from dit_accel.rates import measured
from dit_accel.recipe import Recipe

HERE = {
    "python": "3", "commit": "abc", "cuda": "12",
    "packages": {"dit-accel": "0", "torch": "2", "triton": "3"},
    "cpu": {"name": "a processor", "torch_threads": 2}, "gpus": [{"name": "a GPU"}],
}  # fmt: skip
GRID = TokenLayout((1, 12, 16), text_len=5, text_first=True)
TINY = Case("tiny", GRID, GRID, 3, 16, Clear(4), Clear(3))
DENSE = dataclasses.replace(TINY, pattern=Dense(), small_pattern=Dense())
MATH, OURS = sdpa("math", SDPBackend.MATH), block_sparse("gather", "gather", ours=True)
ABSENT = Provider("peer", None, package="no_such_package")
EIGHT_BIT = dataclasses.replace(sdpa("eight-bit", SDPBackend.MATH), exact=False)
WAN = Blueprint(
    "small-wan", "wan",
    {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
     "freq_dim": 8, "ffn_dim": 40, "num_layers": 2},
    (4, 8), 7, (9, 96, 128), 10,
)  # fmt: skip


def taking(*milliseconds: float):
    """A timer under which the calls take these times."""

    def timer(*runs):
        for run in runs:
            run()
        return [(0.9 * ms, ms, 1.1 * ms) for ms, _ in zip(milliseconds, runs, strict=True)]

    return timer


def wrong(provider: Provider) -> Provider:
    def prepare(*inputs):
        run = provider.prepare(*inputs)
        return lambda: run() * 1.01

    return dataclasses.replace(provider, prepare=prepare)


def attention(providers, timer, out, case=TINY):
    return gpu_bench.run_attention((case,), (torch.float32,), "cpu", providers, timer, out, HERE)


class TestCases:
    @pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.name}-{type(c.pattern).__name__}")
    def test_patterns_fit_their_geometries(self, case):
        dense = isinstance(case.pattern, Dense)
        assert (
            case.pattern.density(case.layout) == 1 if dense else 0 < case.pattern.density(case.layout) < 0.7
        )
        assert dense or 0 < case.small_pattern.density(case.small) < 1
        assert type(case.pattern) is type(case.small_pattern)

    def test_shapes_are_those_of_real_models(self):
        shapes = {(c.name, c.heads, c.layout.seq_len, c.head_dim) for c in CASES}
        flux = {(f"flux-{side}", 24, (side // 16) ** 2 + 512, 128) for side in (1024, 2048, 4096, 8192)}
        assert shapes == flux | {
            ("sd3-1024", 24, 4096 + 333, 64),
            ("hunyuan-720p", 24, 33 * 45 * 80 + 256, 128),
            ("wan-14b-720p", 40, 21 * 45 * 80, 128),
            ("wan-1.3b-480p", 12, 21 * 30 * 52, 128),
        }

    @pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
    def test_steps_are_of_sizes_the_models_take_and_have_recipes(self, step):
        blueprint = step.blueprint
        tokens = blueprint.layout(blueprint.grid(blueprint.transformer(), step.size)).seq_len
        assert 4000 < tokens < 120_000
        recipes = gpu_bench.recipes_for(step)
        assert len(recipes) >= 2
        assert all(recipe.family == blueprint.family for recipe in recipes.values())

    def test_providers(self):
        names = [p.name for p in PROVIDERS]
        assert names == ["sdpa-flash", "sdpa-cudnn", "xformers", "sageattention", "flex", "triton"]
        assert [p.name for p in PROVIDERS if p.ours] == ["triton"]
        assert [p.name for p in PROVIDERS if p.sparse] == ["flex", "triton"]
        assert not next(p for p in PROVIDERS if p.name == "sageattention").exact


class TestAttention:
    def test_numbers_by_hand(self, tmp_path):
        (result,), bad = attention((MATH, EIGHT_BIT, ABSENT, OURS), taking(8.0, 4.0, 2.0), tmp_path)
        assert bad == 0
        assert result.left_out == {"peer": "no_such_package is not installed"}
        assert result.yardstick == "math"  # the quantised one is faster, and no yardstick
        assert result.density == pytest.approx(Clear(4).density(GRID))
        assert result.density < result.block_density < 1
        assert result.speedup("gather") == 4
        pairs = 197**2
        assert result.tflops("math") == pytest.approx(4 * 3 * 16 * pairs / 8e-3 / 1e12)
        assert result.tflops("gather") == pytest.approx(4 * 3 * 16 * pairs * result.density / 2e-3 / 1e12)
        *_, ours = result.cells()
        assert ours[4:6] == ["gather", "2.000"]
        assert ours[7:] == ["4.00", f"{1 / 4 / result.density:.2f}", f"{1 / 4 / result.block_density:.2f}"]

    def test_plans_read_our_kernel_alone(self, tmp_path):
        peer = dataclasses.replace(OURS, name="peer", ours=False)
        (result,), _ = attention((MATH, peer, OURS), taking(8.0, 4.0, 2.0), tmp_path)
        rows = [row for row in result.rows(HERE) if row["metric"] == "efficiency"]
        assert [row["provider"] for row in rows] == ["gather"]

    def test_files(self, tmp_path):
        for _ in range(2):
            results, _ = attention((MATH, ABSENT, OURS), taking(8.0, 2.0), tmp_path)
        with (tmp_path / "bench_cpu.csv").open() as file:
            lines = list(csv.DictReader(file))
        assert tuple(lines[0]) == COLUMNS
        assert len(lines) == 2 * (3 + 7)
        assert lines[0]["shape"].startswith("B1-H3-N197-D16-float32 tiny Clear(radius=4")
        efficiency = measured("cpu", "float32", 16, folder=tmp_path).efficiency  # what plans will find
        assert efficiency == pytest.approx((4 * results[0].block_density,) * 3, rel=1e-3)
        page = gpu_bench.report(results, [], "cuda", HERE)
        assert "a GPU, torch 2, triton 3, CUDA 12, commit abc" in page
        assert "| gather | 2.000 |" in page
        assert "- peer: no_such_package is not installed (tiny)" in page

    def test_our_kernel_when_wrong_is_not_timed(self, tmp_path, capsys):
        results, bad = attention((MATH, wrong(OURS)), None, tmp_path)
        assert (results, bad) == ([], 1)
        assert "WRONG tiny Clear" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_a_wrong_peer_is_left_out_with_the_reason(self, tmp_path):
        peer = wrong(dataclasses.replace(block_sparse("flex", "reference")))
        (result,), bad = attention((MATH, peer, OURS), taking(8.0, 2.0), tmp_path)
        assert bad == 0
        assert "flex" not in result.times
        assert "times what is allowed, not timed" in result.left_out["flex"]

    def test_a_backend_that_cannot_run_is_left_out_with_the_reason(self, tmp_path):
        cudnn = sdpa("cudnn", SDPBackend.CUDNN_ATTENTION)
        (result,), _ = attention((cudnn, MATH, OURS), taking(8.0, 2.0), tmp_path)
        assert list(result.times) == ["math", "gather"]
        assert "kernel" in result.left_out["cudnn"]
        with pytest.raises(UnavailableError, match="no exact dense attention runs on cpu"):
            gpu_attention.measure(TINY, torch.float32, "cpu", (cudnn, OURS), None)

    def test_our_kernel_when_it_does_not_run_is_a_failure(self, tmp_path, capsys):
        missing = dataclasses.replace(OURS, package="no_such_package")
        assert attention((MATH, missing), None, tmp_path) == ([], 1)
        assert "gather: no_such_package is not installed" in capsys.readouterr().err

    def test_a_case_too_large_for_the_device_is_left_out(self, tmp_path, capsys):
        def full(*inputs):
            raise torch.OutOfMemoryError("no memory for this")

        results = attention((MATH, dataclasses.replace(OURS, prepare=full)), None, tmp_path)
        assert results == ([], 0)
        assert "left out, no memory for this" in capsys.readouterr().out

    @pytest.mark.parametrize("case", [TINY, DENSE], ids=lambda c: type(c.pattern).__name__)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_check_tells_right_from_wrong(self, case, dtype):
        assert gpu_attention.check(case, dtype, "cpu", OURS) <= 1
        other = block_sparse("off", "gather")
        shifted = dataclasses.replace(
            other, prepare=lambda q, k, v, mask: other.prepare(q, k.roll(1, 2), v, mask)
        )
        assert gpu_attention.check(case, dtype, "cpu", shifted) > 1


class TestSteps:
    def test_weights_are_random_and_the_output_finite(self):
        model = gpu_steps.random_transformer(WAN, "cpu", torch.float32)
        assert {p.device.type for p in [*model.parameters(), *model.buffers()]} == {"cpu"}
        with torch.inference_mode():
            inputs = WAN.inputs(model, WAN.grid(model, WAN.size), torch.randn)
            out = model(**inputs, return_dict=False)[0]
            assert torch.equal(gpu_steps.share(model)(**inputs, return_dict=False)[0], out)
        assert out.isfinite().all()
        assert out.std() > 0

    def test_a_copy_shares_weights(self):
        model = gpu_steps.random_transformer(WAN, "cpu", torch.float32)
        copied = gpu_steps.share(model)
        ours, theirs = (dict(m.named_parameters()) for m in (model, copied))
        assert ours.keys() == theirs.keys()
        assert all(ours[name] is theirs[name] for name in ours)
        assert copied is not model
        assert copied.blocks[0].attn1 is not model.blocks[0].attn1

    def test_dense_and_sparse_are_what_they_say(self):
        near = Neighborhood((3, 5))
        recipes = {"near": Recipe(near, dense_steps=3), "all": Recipe(Neighborhood((6, 8))), "wide": Recipe(
            Neighborhood((7, 9)))}  # fmt: skip
        outputs = []

        def timer(*runs):
            outputs.append([run().sample for run in runs])
            return taking(6.0, 2.0)(*runs)

        with torch.inference_mode():
            found = list(gpu_steps.measure(Step(WAN, WAN.size), recipes, "cpu", torch.float32, timer))
        first, second, left_out = found
        assert first.density == pytest.approx(near.density(TokenLayout((3, 6, 8))))
        assert (first.speedup, second.density) == (3, 1)
        assert "wide: left out, " in left_out
        assert "window" in left_out
        assert (outputs[0][0] - outputs[0][1]).abs().max() > 1e-4
        torch.testing.assert_close(*outputs[1], rtol=0, atol=1e-4)  # a window of everything is dense
        assert torch.equal(outputs[0][0], outputs[1][0])

    def test_files(self, tmp_path, monkeypatch):
        monkeypatch.setattr(gpu_bench, "recipes_for", lambda step: {"near": Recipe(Neighborhood((3, 5)))})
        steps = (Step(WAN, WAN.size),)
        with torch.inference_mode():
            results = gpu_bench.run_steps(steps, "cpu", torch.float32, taking(6.0, 2.0), tmp_path, HERE)
        with (tmp_path / "bench_cpu.csv").open() as file:
            lines = list(csv.DictReader(file))
        assert [line["metric"] for line in lines] == ["ms", "ms", "density", "block_density", "speedup"]
        assert lines[0]["shape"] == "small-wan 128x96x9 near float32"
        page = gpu_bench.report([], results, "cuda", HERE)
        assert "| small-wan | 128x96x9 | near |" in page
        assert "| 6.0 | 2.0 | 3.00 |" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
class TestWithoutGpu:
    def test_it_prints_the_plan(self, capsys, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        assert gpu_bench.main([]) == 3
        text = capsys.readouterr().out
        for name in [
            *(c.name for c in CASES),
            *(s.name for s in STEPS),
            *(p.name for p in PROVIDERS),
            "CLEAR r=16",
        ]:
            assert name in text
        assert "wan-radial" in text
        assert not list(tmp_path.iterdir())

    def test_parts(self, capsys):
        assert gpu_bench.main(["--part", "steps", "--only", "flux"]) == 3
        text = capsys.readouterr().out
        assert "flux.1-dev 4096x4096" in text
        assert "wan" not in text
        assert "flux-4096" not in text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_timer_on_the_gpu():
    x = torch.randn(4096, 4096, device="cuda")
    start = time.perf_counter()
    once, twice = gpu_bench.interleaved_on_gpu(lambda: x @ x, lambda: x @ x @ x)
    assert time.perf_counter() - start < 10
    assert once[0] <= once[1] <= once[2]
    assert 1.5 < twice[1] / once[1] < 2.5
