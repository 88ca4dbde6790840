"""Context parallelism: several processes give the output of one, and what they cannot share is refused."""

from dataclasses import replace
from types import SimpleNamespace

import processes
import pytest
import torch
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ParallelConfig

from dit_accel import TokenLayout, UnavailableError, enable
from dit_accel.attention.shards import Shards
from dit_accel.parallel import context, context_parallel, plan_of
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


def check_sent(told: dict[str, dict], family: str, count: int) -> None:
    """The bytes sent are those of q, k, v and the output that are another's, by hand."""
    dense = told[f"{family}: dense"]
    tokens, width, layers = dense["sizes"]
    each = 4 * width * 4 * layers * dense["calls"] * (count - 1) / count**2
    assert dense["sent"] == pytest.approx(tokens * each, abs=2 * count * each)  # parts may differ by a token


def test_two_processes(tmp_path):
    """Every kind of recipe; where heads differ, those with most to do are in two processes."""
    told = outcomes(tmp_path, 2, "flux", "wan")
    check(told)
    tokens, width, layers, calls = 144, 64, 2, 2
    assert told["wan: dense"]["sent"] == 4 * tokens * width * 4 * layers * calls // 4
    sparse = (said for case, said in told.items() if case.startswith("wan") and "calls" in said)
    assert {said["sent"] for said in sparse if said["calls"] == calls} == {told["wan: dense"]["sent"]}
    for family in ("flux", "wan"):
        check_sent(told, family, 2)
        for case in ("last heads", "routed, last heads"):
            for groups, before, after in told[f"{family}: {case}"]["balance"]:
                assert groups == [[0, 2], [1, 3]]
                assert after == pytest.approx(1)
                assert before > after + 0.01
            assert "computes 1.00 times the mean, with" in told[f"{family}: {case}"]["summary"]
        assert told[f"{family}: static in model order"]["balance"] == []


@pytest.mark.slow
def test_two_processes_by_plans_of_our_own(tmp_path):
    check(outcomes(tmp_path, 2, "flux2", "sd3", "qwen", "hunyuan", "hunyuan15"))


OTHERS = ("zimage", "hunyuanimage", "ltx", "ltx2", "cogvideox", "mochi", "kandinsky5", "chrono", "helios")


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_families_with_fewer_cases(tmp_path, count):
    told = outcomes(tmp_path, count, *OTHERS)
    check(told)
    for family in OTHERS:
        check_sent(told, family, count)


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

    @pytest.mark.parametrize(
        ("family", "name", "reason"),
        [
            ("skyreels", "SkyReelsV2", "its timesteps of frames, and its mask of chunks"),
            ("animate", "WanAnimate", "its face adapter tells frames by the places of all tokens"),
            ("chroma", "Chroma", "its mask of text, which diffusers adds to scores, is of all tokens"),
            ("minimaxh3", "MiniMaxH3", "diffusers' plan splits one packed sequence, and fails where"),
        ],
    )
    def test_family_without_a_plan(self, families, family, name, reason):
        pipe = configured(families[family].make(), ulysses_degree=2)
        self.refused(pipe, f"not supported for {name}.*{reason}.* one process for each prompt")
        with pytest.raises(UnavailableError, match=f"no plan for context parallelism of {name}.*{reason}"):
            plan_of(pipe.transformer)

    def test_transformer_of_a_family_with_a_plan_that_has_none(self, wan):
        pipe = wan.make()
        pipe.transformer._cp_plan = None  # as that of VACE
        self.refused(configured(pipe, ulysses_degree=2), "diffusers has no plan for this one")

    def test_history_that_is_told_by_its_place(self, helios):
        transformer = helios.make().transformer
        reason = family_of(transformer).not_parallel(transformer, {"latents_history_short": 1})
        assert "`is_amplify_history` counts the history's tokens inside" in reason
        assert family_of(transformer).not_parallel(transformer, {}) is None

    def test_keyframes(self, ltx2):
        transformer = ltx2.make().transformer
        transformer.register_to_config(use_keyframes_abs_pos_embedding=True)
        reason = family_of(transformer).not_parallel(transformer, {"video_keyframes_mask": 1})
        assert "`video_keyframes_mask` is of all tokens" in reason

    def test_stock_attention_under_a_plan_of_our_own(self, sd3):
        with pytest.raises(UnavailableError, match=r"for accelerated attention; call `dit_accel\.enable"):
            context._check_enabled(sd3.make().transformer, ())

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

    @pytest.mark.parametrize("refused", ["enabled", "shared"])
    def test_none_is_shared_where_one_is_refused(self, wan, monkeypatch, refused):
        pipe, shared = wan.make(two=True), []
        if refused == "enabled":
            enable(pipe.transformer_2, self.recipe)
        else:
            configured(SimpleNamespace(transformer=pipe.transformer_2), ulysses_degree=2)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        monkeypatch.setattr(context, "_enable", lambda transformer, degree, plan: shared.append(transformer))
        message = {"enabled": r"before `dit_accel\.enable`", "shared": "share the calls .* already; load"}
        with pytest.raises(UnavailableError, match=message[refused]):
            context_parallel(pipe)
        assert not shared


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
        with pytest.raises(ValueError, match="23 tokens do not divide by 2"):
            replace(self.shards, together=True).check(TokenLayout((1, 4, 4), 7))
        uneven = Shards(1, 2, None, 5, frozenset(), uneven=True)
        uneven.check(TokenLayout((1, 4, 4), 7))
        with pytest.raises(ValueError, match="1 text tokens are fewer than the 2 processes"):
            uneven.check(TokenLayout((1, 4, 4), 1))

    def test_tokens_of_another_plan(self):
        q = torch.zeros(1, 16, 5, 8)
        with pytest.raises(RuntimeError, match=r"process 1 of 2 has 16 queries .* should have 8.*plan_of"):
            self.shards.to_heads(q, q, q, TokenLayout((1, 4, 4)))
