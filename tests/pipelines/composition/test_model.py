"""What is done with the transformer itself: saving it, its attention backend, gradients."""

import pytest
import torch

from dit_accel.patterns import Dense
from dit_accel.runtime.switching import accelerated, enable


@pytest.mark.feature("`save_pretrained` while enabled")
def test_save_pretrained(case, tmp_path):
    pipe = case.make()
    pipe.transformer.save_pretrained(tmp_path / "before")
    enable(pipe, case.recipe)
    case.run(pipe, steps=1)
    pipe.transformer.save_pretrained(tmp_path / "enabled")
    files = {path.name: path.read_bytes() for path in (tmp_path / "before").iterdir()}
    assert len(files) == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "enabled").iterdir()} == files
    again = type(pipe.transformer).from_pretrained(tmp_path / "enabled")
    assert all(map(torch.equal, again.state_dict().values(), pipe.transformer.state_dict().values()))


@pytest.mark.feature("`set_attention_backend` while enabled")
def test_attention_backend(case):
    """It reaches dense layers and steps, Wan's cross-attention too, and stays after `disable`."""

    other = "flex" if case.family == "far" else "_native_math"  # AnyFlow-FAR's own is of no other kind

    def math_backend(pipe):
        pipe.transformer.set_attention_backend(other)

    pipe = case.make()
    layers = case.layers(pipe.transformer).values()
    with accelerated(pipe, case.recipe):
        sparse = case.run(pipe)
        math_backend(pipe)
        case.close(case.run(pipe), sparse)
    assert all(layer.processor._attention_backend == other for layer in layers)
    assert torch.equal(case.run(pipe), case.run(case.untouched(math_backend)))


def predicted(case, pipe) -> torch.Tensor:
    sample = pipe.transformer(**case.inputs())[0]
    return sample if isinstance(sample, torch.Tensor) else torch.stack(sample)  # of Z-Image a list


def of_queries(case, pipe) -> torch.Tensor:
    """The gradient of the first layer's projection of queries."""
    layer = next(iter(case.layers(pipe.transformer).values()))
    return (layer.to_query if case.family == "kandinsky5" else layer.to_q).weight.grad.clone()


def gradient(case, pipe) -> torch.Tensor:
    pipe.transformer.zero_grad()
    predicted(case, pipe).square().sum().backward()
    return of_queries(case, pipe)


def of_the_model(case, pipe) -> torch.Tensor | None:
    """The gradient without acceleration; None where it has none: flex attention on a CPU."""
    if case.family != "far" or torch.cuda.is_available():
        return gradient(case, pipe)
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        gradient(case, pipe)
    return None


def same(found: torch.Tensor | None, expected: torch.Tensor | None) -> bool:
    return found is expected if expected is None else torch.equal(found, expected)


@pytest.mark.feature("Backward pass")
def test_backward(case):
    pipe, expected = case.make(), gradient(case, case.masked())
    untouched = of_the_model(case, pipe)
    with accelerated(pipe, case.recipe):
        torch.testing.assert_close(
            gradient(case, pipe), expected, rtol=1e-3, atol=1e-3 * expected.abs().max()
        )
    assert same(of_the_model(case, pipe), untouched)


@pytest.mark.feature("Gradient checkpointing")
def test_gradient_checkpointing(case, cell):
    """Blocks run again in the backward pass, in the call that they were in, whatever came after it."""
    pipe, expected = case.make(), gradient(case, case.masked())
    pipe.transformer.enable_gradient_checkpointing()
    if case.family == "hunyuanimage":
        with pytest.raises(TypeError, match="unexpected keyword argument 'attention_mask'"):
            predicted(case, pipe)
        cell.no_such_thing("diffusers' own call of it fails")
        return
    untouched = of_the_model(case, pipe)
    with accelerated(pipe, case.recipe):
        pipe.transformer.zero_grad()
        loss = predicted(case, pipe).square().sum()
        with accelerated(pipe, Dense()), torch.no_grad():
            pipe.transformer(**case.inputs())
        loss.backward()
        torch.testing.assert_close(
            of_queries(case, pipe), expected, rtol=1e-3, atol=1e-3 * expected.abs().max()
        )
    assert same(of_the_model(case, pipe), untouched)
