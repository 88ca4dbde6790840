"""Windows over time: which frames, with which weights, and predictions against the same by hand."""

import pytest
import torch

import dit_accel
from dit_accel import Recipe
from dit_accel.highres import ContextWindows, Swim, context_windows, generate
from dit_accel.highres.context import looped_windows, ramp
from dit_accel.patterns import Clear
from dit_accel.pipelines import load


def test_static_windows():
    assert context_windows(21, 21, 4) == [range(21)]
    assert context_windows(5, 21, 4) == [range(5)]
    assert context_windows(38, 21, 4) == [range(21), range(17, 38)]
    assert context_windows(40, 21, 4) == [range(21), range(17, 38), range(19, 40)]
    assert context_windows(4, 1, 0) == [range(i, i + 1) for i in range(4)]
    for frames in range(1, 60):
        windows = context_windows(frames, 7, 3)
        assert sorted({f for window in windows for f in window}) == list(range(frames))
        assert windows[-1].stop == frames
    for values in ((0, 3, 1), (5, 0, 0), (5, 3, 3), (5, 3, -1)):
        with pytest.raises(ValueError, match=r"`(frames|size|overlap)` must be"):
            context_windows(*values)


def test_ramps():
    weights = [0.2, 0.4, 0.6, 0.8]
    close = lambda window, wanted: torch.allclose(ramp(window, 30, 4), torch.tensor(wanted))  # noqa: E731
    assert close(range(10), [1.0] * 6 + weights[::-1])
    assert close(range(20, 30), weights + [1.0] * 6)
    assert close(range(5, 15), [*weights, 1.0, 1.0, *weights[::-1]])
    assert torch.equal(ramp(range(5, 8), 30, 0), torch.ones(3))


def test_looped_windows():
    assert looped_windows(8, 4, 2, 0, 1) == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 0, 1]]
    assert looped_windows(8, 4, 2, 1, 1)[0] == [4, 5, 6, 7]  # a half round on
    assert looped_windows(8, 4, 2, 2, 1)[0] == [2, 3, 4, 5]  # a quarter
    assert [0, 2, 4, 6] in looped_windows(8, 4, 2, 0, 2)
    for step in range(9):
        windows = looped_windows(11, 4, 1, step, 3)
        assert {f for window in windows for f in window} == set(range(11))
        assert all(len(set(window)) == 4 for window in windows)


def prediction(pipe, inputs):
    with torch.no_grad():
        return pipe.transformer(**inputs)


@pytest.mark.parametrize("recipe", [None, Recipe(Clear(3))], ids=["dense", "sparse"])
def test_predictions_are_means_over_windows(wan, recipe):
    pipe = wan.pipe
    if recipe:
        dit_accel.enable(pipe, recipe)
    inputs = {**wan.inputs(pipe), "return_dict": True}
    x = torch.randn(1, 4, 7, 12, 16, generator=torch.Generator().manual_seed(0))
    wanted, weight = torch.zeros(1, 4, 7, 12, 16), torch.zeros(7)
    for window in context_windows(7, 3, 1):
        part = prediction(pipe, {**inputs, "hidden_states": x[:, :, list(window)]}).sample
        own = ramp(window, 7, 1)
        wanted[:, :, list(window)] += part * own[:, None, None]
        weight[list(window)] += own
    wanted /= weight[:, None, None]
    transformer = pipe.transformer
    with ContextWindows(3, 1).applied(pipe):
        assert torch.allclose(prediction(pipe, {**inputs, "hidden_states": x}).sample, wanted, atol=1e-6)
        short = x[:, :, :3]
        as_tuple = prediction(pipe, {**inputs, "hidden_states": short, "return_dict": False})[0]
    assert pipe.transformer is transformer
    assert torch.allclose(as_tuple, prediction(pipe, {**inputs, "hidden_states": short}).sample, atol=1e-6)


@pytest.mark.parametrize("schedule", ["static", "looped"])
def test_runs(wan, schedule):
    context = ContextWindows(3, 1, schedule)
    with context.applied(wan.pipe):
        result = wan.run(wan.pipe, grid=(6, 4, 4), cfg=3.0)
    assert result.shape[2] == 6
    assert torch.isfinite(result).all()


def test_with_the_dual_path_and_its_cache(wan):
    """Each window keeps what its own full branch read."""
    whole = {}
    for cache_steps in (None, 1, 2):
        with Swim((1, 1), cache_steps).applied(wan.pipe), ContextWindows(3, 1).applied(wan.pipe):
            whole[cache_steps] = wan.run(wan.pipe, grid=(5, 4, 4), steps=2)
    assert torch.allclose(whole[1], whole[None], atol=1e-5)
    assert not torch.allclose(whole[2], whole[None], atol=1e-5)


def test_longer_video():
    pipe = load("tiny-wan")
    pipe.set_progress_bar_config(disable=True)
    shared = {
        "width": 64,
        "height": 64,
        "num_inference_steps": 2,
        "output_type": "latent",
        "max_sequence_length": 24,
    }
    found = generate(
        pipe, "a fox moving left", num_frames=29, method="windows",
        generator=torch.Generator().manual_seed(0), **shared,
    ).frames  # fmt: skip
    assert found.shape[2] == 8
    with ContextWindows(5, 1).applied(pipe):
        wanted = pipe(
            "a fox moving left", num_frames=29, generator=torch.Generator().manual_seed(0), **shared
        ).frames
    assert torch.equal(found, wanted)
    looped = ContextWindows(3, 1, "looped")
    with pytest.raises(ValueError, match="use cache_steps=None"):
        generate(pipe, "a fox", **{**shared, "width": 128}, context=looped)
    with pytest.raises(ValueError, match='`context` must be "auto"'):
        generate(pipe, "a fox", **{**shared, "width": 128}, context=3)


def test_bad_values():
    with pytest.raises(ValueError, match="`schedule` must be 'static' or 'looped', got 'uniform'"):
        ContextWindows(schedule="uniform")
    with pytest.raises(ValueError, match="`overlap` must be below `size` 4, got 4"):
        ContextWindows(4, 4)
