"""Context parallelism: several processes give the output of one, and what they cannot share is refused."""

from types import SimpleNamespace

import processes
import pytest
import torch
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ParallelConfig

from dit_accel import TokenLayout, UnavailableError, enable
from dit_accel.attention.shards import Shards
from dit_accel.parallel import context_parallel, plan_of
from dit_accel.patterns import Neighborhood
from dit_accel.pipelines import family_of

# of the largest value; codes of few bits may round the other way, and tokens in another order are off by 1e-2
ROUNDING, OF_CODES = 1e-6, 1e-4


def outcomes(folder, count: int, *families: str) -> dict[str, dict]:
    """What every case told, of the worst process."""
    told = processes.run("context_parallel_cases", folder, count, *families)
    return {case: max((one[case] for one in told), key=lambda x: x.get("error", 9)) for case in told[0]}


def check(told: dict[str, dict]) -> None:
    wrong = {
        case: said
        for case, said in told.items()
        if not said.get("error", 9) < (OF_CODES if "int8" in case else ROUNDING)
    }
    assert not wrong, "\n".join(f"{case}: {said.get('raised', said)}" for case, said in wrong.items())


def test_two_processes(tmp_path):
    """Every kind of recipe; the bytes sent are those of q, k, v and the output that are another's."""
    told = outcomes(tmp_path, 2, "flux", "wan")
    check(told)
    tokens, width, layers, calls = 144, 64, 2, 2
    assert told["wan: dense"]["sent"] == 4 * tokens * width * 4 * layers * calls // 4
    alike = [said["sent"] for case, said in told.items() if case.startswith("wan") and said["calls"] == calls]
    assert set(alike) == {told["wan: dense"]["sent"]}


@pytest.mark.slow
def test_two_processes_by_plans_of_our_own(tmp_path):
    check(outcomes(tmp_path, 2, "flux2", "sd3", "qwen", "hunyuan", "hunyuan15"))


@pytest.mark.slow
def test_four_processes(tmp_path):
    check(outcomes(tmp_path, 4, "flux", "wan", "flux2", "sd3", "qwen", "hunyuan", "hunyuan15"))


def configured(pipe, **options):
    """A pipeline whose transformer believes to be shared."""
    config = ContextParallelConfig(**options)
    config._ulysses_local_rank, config._ulysses_mesh = 0, SimpleNamespace(get_group=lambda: None)
    pipe.transformer._parallel_config = ParallelConfig(context_parallel_config=config)
    return pipe


class TestRefused:
    recipe = Neighborhood((3, 3, 3))

    def refused(self, pipe, match):
        with pytest.raises(UnavailableError, match=match):
            enable(pipe, self.recipe)

    def test_ring(self, wan):
        self.refused(configured(wan.make(), ring_degree=2), "one chunk of keys at a time.* `Context")

    def test_more_processes_than_heads(self, wan):
        self.refused(
            configured(wan.make(), ulysses_degree=4), "more than the 2 heads .* use at most that many"
        )

    def test_family_without_a_plan(self, skyreels):
        pipe = configured(skyreels.make(), ulysses_degree=2)
        self.refused(pipe, "not supported for SkyReelsV2.* one process for each prompt")
        with pytest.raises(UnavailableError, match="no plan for context parallelism of SkyReelsV2"):
            plan_of(pipe.transformer)

    def test_switched_on_after_enable(self, wan):
        pipe = wan.make()
        enable(pipe, self.recipe)
        configured(pipe, ulysses_degree=2)
        with pytest.raises(UnavailableError, match="call `enable` again after it"):
            pipe.transformer(None, timestep=None)

    def test_first_tokens_by_their_place(self, hunyuan):
        pipe = configured(hunyuan.make(image_condition_type="token_replace"), ulysses_degree=2)
        enable(pipe, self.recipe)
        with pytest.raises(UnavailableError, match="counts its first tokens inside"):
            pipe.transformer(None, timestep=None)

    def test_controlnet(self, flux):
        transformer = flux.make().transformer
        reason = family_of(transformer).not_parallel(transformer, {"controlnet_block_samples": [1]})
        assert "one process with ControlNet" in reason

    def test_without_processes(self, wan):
        with pytest.raises(UnavailableError, match=r"needs several processes.*init_process_group"):
            context_parallel(wan.make())


class TestShards:
    shards = Shards(rank=1, count=2, group=None, heads=5, layers=frozenset())

    def test_heads_and_tokens_as_tensor_split_has_them(self):
        for tokens in range(1, 9):
            parts = torch.arange(tokens).tensor_split(2)
            assert self.shards.sizes(tokens) == [len(part) for part in parts]
        assert self.shards.own_heads == range(3, 5)

    def test_lengths_that_do_not_divide(self):
        with pytest.raises(ValueError, match=r"7 text tokens do not divide by 2 .* `Context.*anything=True"):
            self.shards.check(TokenLayout((1, 4, 4), 7))
        uneven = Shards(1, 2, None, 5, frozenset(), uneven=True)
        uneven.check(TokenLayout((1, 4, 4), 7))
        with pytest.raises(ValueError, match="1 text tokens are fewer than the 2 processes"):
            uneven.check(TokenLayout((1, 4, 4), 1))

    def test_tokens_of_another_plan(self):
        q = torch.zeros(1, 16, 5, 8)
        with pytest.raises(RuntimeError, match=r"process 1 of 2 has 16 queries .* should have 8.*plan_of"):
            self.shards.to_heads(q, q, q, TokenLayout((1, 4, 4)))
