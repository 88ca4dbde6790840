"""A provider is timed where it is right and repeats, and told apart where it is not."""

import dataclasses

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend

from dit_accel import BlockMask, TokenLayout, UnavailableError
from dit_accel.evals.gpu_bench import attention, backward, cases, peers, timing
from dit_accel.evals.gpu_bench.peers import PROVIDERS, block_sparse, sdpa
from dit_accel.kernels import quantizations
from dit_accel.patterns import Clear

CASE = cases.Case("tiny", "clear", TokenLayout((1, 24, 24), text_len=9), 3, 16, Clear(2))
KEY = ["tiny", "clear"]


@pytest.fixture(autouse=True)
def _case(monkeypatch):
    monkeypatch.setitem(cases.BY_NAME, tuple(KEY), CASE)
    attention.inputs.cache_clear()


def rows(provider, monkeypatch):
    monkeypatch.setitem(PROVIDERS, provider.name, provider)
    return list(attention.run("cpu", KEY, provider.name))


def wrapped(provider, change):
    """A provider whose result goes through a function."""

    def prepare(*inputs):
        run = provider.prepare(*inputs)
        return lambda: change(run())

    return dataclasses.replace(provider, prepare=prepare)


def test_numbers_by_hand(monkeypatch):
    monkeypatch.setattr(attention, "measure", lambda call, device: timing.Timed(1.0, 2.0, 3.0, 4))
    (row,) = rows(PROVIDERS["gather"], monkeypatch)
    mask = CASE.pattern.block_mask(CASE.layout, (128, 64))
    assert row["density"] == mask.density < row["block_density"] == mask.block_density < 1
    pairs = (24 * 24 + 9) ** 2 * mask.block_density
    assert row["tflops"] == pytest.approx(4 * 3 * 16 * pairs / 2e-3 / 1e12)
    assert (row["p20"], row["ms"], row["p80"], row["repeats"]) == (1.0, 2.0, 3.0, 4)
    (dense,) = rows(sdpa("dense", SDPBackend.MATH), monkeypatch)
    assert dense["tflops"] == pytest.approx(row["tflops"] / mask.block_density)


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    (row,) = rows(wrapped(PROVIDERS["gather"], lambda out: out * 1.01), monkeypatch)
    assert row["kind"] == "wrong"
    assert "times what is allowed, not timed" in row["reason"]


def test_nor_is_one_that_gives_not_a_number(monkeypatch):
    (row,) = rows(wrapped(PROVIDERS["gather"], lambda out: out * torch.nan), monkeypatch)
    assert row["kind"] == "wrong"


def test_nor_is_ours_when_it_does_not_repeat(monkeypatch):
    calls = []

    def drift(out):
        calls.append(1)
        return out + 1e-9 * len(calls) * out.abs().max()

    (row,) = rows(wrapped(PROVIDERS["gather"], drift), monkeypatch)
    assert row == {"kind": "wrong", "reason": "another result the second time, not timed"}
    calls.clear()
    peer = dataclasses.replace(wrapped(PROVIDERS["gather"], drift), ours=False)
    (row,) = rows(peer, monkeypatch)
    assert row["kind"] == "time", "others may add up in any order"


def test_who_cannot_run_says_why(monkeypatch):
    absent = dataclasses.replace(PROVIDERS["gather"], name="absent", package="no_such_package")
    with pytest.raises(UnavailableError, match="no_such_package is not installed"):
        rows(absent, monkeypatch)
    with pytest.raises(RuntimeError, match="kernel"):
        rows(sdpa("cudnn", SDPBackend.CUDNN_ATTENTION), monkeypatch)


def test_providers_get_the_same_inputs():
    first, second = (attention.inputs(CASE, "cpu") for _ in range(2))
    assert all(a is b for a, b in zip(first, second, strict=True))
    q = first[0]
    assert q.shape == (1, 3, 585, 16)
    assert q.stride()[1:] == (16, 3 * 16, 1), "as models have them"


def test_the_stand_in_is_for_a_rehearsal_alone():
    assert peers.kernel("cuda") == "triton"
    assert not PROVIDERS["sageattention"].exact
    ours = {name: provider for name, provider in PROVIDERS.items() if provider.ours}
    assert [name for name, provider in ours.items() if provider.exact] == [
        "triton", "triton-tma", "triton-gluon", "gather",
    ]  # fmt: skip
    assert {name for name, provider in ours.items() if not provider.exact} == {
        f"{name}-{format}" for name in ("triton", "gather") for format in quantizations()
    } | {"triton-tma-int8", "triton-gluon-int8", "triton-tma-int8-fp8"} | {
        f"{name}-tail" for name in ("triton", "triton-tma", "triton-gluon", "gather")
    }


def backward_rows(provider, monkeypatch):
    monkeypatch.setitem(PROVIDERS, provider.name, provider)
    return list(backward.run("cpu", KEY, provider.name))


def test_a_backward_pass_by_hand(monkeypatch):
    monkeypatch.setattr(backward, "measure", lambda call, device: (call(), timing.Timed(1.0, 2.0, 3.0, 4))[1])
    (row,) = backward_rows(PROVIDERS["gather"], monkeypatch)
    mask = CASE.pattern.block_mask(CASE.layout, (128, 64))
    pairs = (24 * 24 + 9) ** 2 * mask.block_density
    assert row["kind"] == "backward"
    assert row["tflops"] == pytest.approx(2.5 * 4 * 3 * 16 * pairs / 2e-3 / 1e12)
    (dense,) = backward_rows(sdpa("dense", SDPBackend.MATH), monkeypatch)
    assert dense["tflops"] == pytest.approx(row["tflops"] / mask.block_density)


def test_wrong_gradients_are_not_timed(monkeypatch):
    (row,) = backward_rows(wrapped(PROVIDERS["gather"], lambda out: out * 1.01), monkeypatch)
    assert row["kind"] == "wrong"
    assert "gradients: error" in row["reason"]


def test_gradients_with_a_tail_are_held_against_plain_pytorch(monkeypatch):
    provider = PROVIDERS["gather-tail"]
    (row,) = backward_rows(provider, monkeypatch)
    assert (row["kind"], row["provider"]) == ("backward", "gather-tail")
    for change in (lambda out: out * 1.01, lambda out: out * torch.nan):
        (row,) = backward_rows(wrapped(provider, change), monkeypatch)
        assert row["kind"] == "wrong"
    (row,) = backward_rows(dataclasses.replace(PROVIDERS["gather"], tail="pooled"), monkeypatch)
    assert row["kind"] == "wrong", "a tail that is left out is missed"


@pytest.mark.parametrize(("capability", "size"), [((9, 0), (128, 128)), ((10, 0), (256, 128))])
def test_flash_attention_4_gets_masks_in_blocks_of_its_gpu(monkeypatch, capability, size):
    provider = PROVIDERS["fa4"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    seen = []

    def prepare(q, k, v, mask):
        seen.append(mask.block_size)
        return PROVIDERS["gather"].prepare(q, k, v, mask)

    (row,) = rows(dataclasses.replace(provider, prepare=prepare, package="torch"), monkeypatch)
    assert (row["kind"], seen) == ("time", [size])


@pytest.mark.parametrize("format", quantizations())
def test_a_format_has_an_error_of_its_own(monkeypatch, format):
    provider = PROVIDERS[f"gather-{format}"]
    (row,) = rows(provider, monkeypatch)
    assert (row["kind"], row["exact"], row["sparse"]) == ("time", False, True)
    assert provider.error is not None
    worse = wrapped(provider, lambda out: out * (1 + 2 * provider.error))
    (row,) = rows(worse, monkeypatch)
    assert row["kind"] == "wrong"


def test_a_tail_is_held_against_plain_pytorch(monkeypatch):
    provider = PROVIDERS["gather-tail"]
    (row,) = rows(provider, monkeypatch)
    assert row["kind"] == "time"
    for change in (lambda out: out * 1.02, lambda out: out * torch.nan):
        (row,) = rows(wrapped(provider, change), monkeypatch)
        assert row["kind"] == "wrong"
    without = dataclasses.replace(peers.block_sparse("gather", "gather"), tail="pooled", error=provider.error)
    (row,) = rows(without, monkeypatch)
    assert row["kind"] == "wrong", "a tail that is left out is missed"


def test_flex_is_compiled_anew_for_each_mask(monkeypatch):
    """More masks than PyTorch compiles before it goes on uncompiled."""
    compile_, options = torch.compile, []

    def compile_less(function, **given):
        options.append(given)
        return compile_(function, **given, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_less)
    masks = torch._dynamo.config.recompile_limit + 2
    for number in range(masks):
        size = 128 + 32 * number
        torch.manual_seed(number)
        mask = BlockMask.from_token_mask(torch.rand(size, size) < 0.5, (32, 32))
        q, k, v = torch.randn(3, 1, 2, size, 16)
        run = PROVIDERS["flex"].prepare(q, k, v, mask)
        counters.clear()
        torch.testing.assert_close(run(), block_sparse("plain", "gather").prepare(q, k, v, mask)())
        assert counters["stats"]["unique_graphs"] == 1
    assert all(given["fullgraph"] for given in options)
    assert len(options) == masks


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_timer_on_the_gpu():
    x = torch.randn(4096, 4096, device="cuda")
    once, twice = timing.measure(lambda: x @ x, "cuda"), timing.measure(lambda: x @ x @ x, "cuda")
    assert once.p20 <= once.ms <= once.p80
    assert 1.5 < twice.ms / once.ms < 2.5
