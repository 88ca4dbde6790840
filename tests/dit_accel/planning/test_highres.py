"""Plans of high-resolution runs: stages, calls, and memory against what real runs hold."""

import pytest
import torch

from dit_accel.highres import Naive, Swim
from dit_accel.pipelines import load
from dit_accel.pipelines.tiny import weights_dir
from dit_accel.planning import autoencoders
from dit_accel.planning.highres import plan_highres
from dit_accel.planning.live_tensors import LiveTensors
from dit_accel.planning.model_config import of_model


@pytest.fixture(scope="module")
def tiny_flux():
    return load("tiny-flux")


@pytest.fixture
def elsewhere(monkeypatch):
    """No GPU is here, so that no times are measured for one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def planned(method="swim", **options):
    return plan_highres(method, **{"size": (128, 128), "model": "tiny-flux", "steps": 10, **options})


def test_live_tensors():
    given = torch.empty(1000)
    with LiveTensors() as live:
        a = torch.empty(250)  # 1000 bytes
        view = a[:100].view(10, 10)
        del a
        b = torch.empty(250)
        given[:500].add_(1)
        assert live.now == live.peak == 2000
        del view
        assert live.now == 1000
        c = b + b
    assert (live.now, live.peak, len(c)) == (2000, 2000, 250)


def test_convolutions_hold_a_copy_of_their_input():
    x, weight = torch.empty(1, 4, 8, 8), torch.empty(2, 4, 1, 1)
    with LiveTensors(copies=True) as live:
        torch.nn.functional.conv2d(x, weight)
    assert live.peak == 4 * (2 * 64 + 4 * 64)


@pytest.mark.parametrize("method", [Naive((4, 4)), Swim((4, 4), 1)], ids=["naive", "swim"])
def test_the_transformers_memory_is_what_it_holds(tiny_flux, elsewhere, method):
    answer, transformer = planned(method, device="cuda"), tiny_flux.transformer
    given = of_model("tiny-flux").inputs(transformer, (1, 16, 16), lambda *shape: torch.randn(shape))
    held = sum(x.nbytes for x in given.values())
    with torch.no_grad(), method.applied(tiny_flux), transformer.cache_context("cond"):
        transformer(**given)  # which makes masks
        with LiveTensors() as live:
            transformer(**given)
    assert answer.stages[2].peak - answer.weights == pytest.approx(live.peak + held, rel=0.1)


def test_the_autoencoders_memory_is_what_it_holds(tiny_flux):
    config = of_model("tiny-flux")
    vae = autoencoders.autoencoder(config, weights_dir("tiny-flux"), torch.float32)
    with torch.no_grad(), LiveTensors(copies=True) as live:
        tiny_flux.vae.decode(torch.zeros(1, 4, 32, 32))
    assert autoencoders.decoding(vae, config, (1, 128, 128), False).peak == live.peak


def test_stages_and_calls():
    answer = planned("swim", strength=0.5)
    assert [(s.name, s.size, s.steps, s.calls) for s in answer.stages] == [
        ("native pass", (1, 64, 64), 10, 20),
        ("decode, enlarge, encode", (1, 128, 128), 0, 0),
        ("pass above native size", (1, 128, 128), 5, 13),  # 5 and 5 in windows, 3 guide
        ("decode", (1, 128, 128), 0, 0),
    ]
    assert all(stage.seconds > 0 and stage.peak > answer.weights for stage in answer.stages)
    assert answer.seconds == pytest.approx(sum(stage.seconds for stage in answer.stages))
    assert answer.peak == max(stage.peak for stage in answer.stages)


def test_stages_of_other_runs(elsewhere):
    assert planned("swim", strength=0.5, guided=False, device="cuda").stages[2].calls == 8
    assert [s.steps for s in planned("growing", device="cuda").stages] == [3, 0, 7, 0]
    names = [s.name for s in planned("direct", device="cuda").stages]
    assert names == ["pass above native size", "decode"]


def test_longer_videos(elsewhere):
    options = {"model": "tiny-wan", "frames": 33, "device": "cuda", "guided": False}
    windows = planned("windows", **options).stages[0]
    assert windows.calls == 10 * 2  # 9 latent frames in windows of 5 with an overlap of 1
    assert windows.peak == planned("windows", **{**options, "frames": 17}).stages[0].peak


def test_what_is_not_known(elsewhere):
    answer = planned(model=of_model("tiny-flux"), device="cuda", dtype=torch.bfloat16)
    assert [stage.seconds for stage in answer.stages] == [None] * 4
    assert [stage.peak is None for stage in answer.stages] == [False, True, False, True]
    assert answer.seconds is None
    assert any("no cuda to measure" in note for note in answer.notes)
    assert any("nothing is known of the autoencoder" in note for note in answer.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "swimm"}, "`method` must be one of swim"),
        ({"size": (100, 128)}, "must be a multiple of 8"),
        ({"size": (32, 32)}, "must be of at least the native area"),
        ({"strength": 0}, "`strength` must be above 0"),
        ({"strength": 0.01}, "leaves none of 10 steps"),
    ],
)
def test_refused(elsewhere, changes, message):
    with pytest.raises(ValueError, match=message):
        planned(**{"device": "cuda", **changes})
