"""One step of whole transformers: random weights, shared by the copy that a recipe runs on."""

import pytest
import torch

from dit_accel import TokenLayout, UnavailableError
from dit_accel.evals.gpu_bench import steps
from dit_accel.patterns import Neighborhood
from dit_accel.recipe.recipe import Recipe

(STEP,) = steps.REHEARSAL


def test_weights_are_random_and_the_output_finite():
    model = steps.random_transformer(STEP.model, "cpu", torch.float32)
    assert {p.device.type for p in [*model.parameters(), *model.buffers()]} == {"cpu"}
    with torch.inference_mode():
        inputs = STEP.model.inputs(model, STEP.model.grid(model, STEP.size), torch.randn)
        out = model(**inputs, return_dict=False)[0]
        assert torch.equal(steps.share(model)(**inputs, return_dict=False)[0], out)
    assert out.isfinite().all()
    assert out.std() > 0


def test_a_copy_shares_weights():
    model = steps.random_transformer(STEP.model, "cpu", torch.float32)
    copied = steps.share(model)
    ours, theirs = (dict(m.named_parameters()) for m in (model, copied))
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)
    assert copied is not model
    assert copied.blocks[0].attn1 is not model.blocks[0].attn1


def test_dense_and_sparse_are_what_they_say(monkeypatch):
    near = Neighborhood((3, 5))
    recipes = {"near": Recipe(near, dense_steps=3), "all": Recipe(Neighborhood((6, 8))), "wide": Recipe(
        Neighborhood((7, 9)))}  # fmt: skip
    measure, outputs = steps.measure, []

    def kept(call, device):
        outputs.append(call().sample)
        return measure(call, device)

    monkeypatch.setattr(steps, "measure", kept)
    with torch.inference_mode():
        dense, first, second, left_out = steps.compare(STEP, recipes, "cpu", torch.float32)
    assert (dense["recipe"], first["recipe"], second["recipe"]) == (None, "near", "all")
    assert first["density"] == pytest.approx(near.density(TokenLayout((3, 6, 8))))
    assert second["density"] == 1
    assert (left_out["kind"], left_out["recipe"]) == ("left out", "wide")
    assert "window" in left_out["reason"]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4
    torch.testing.assert_close(outputs[0], outputs[2], rtol=0, atol=1e-4)  # a window of everything is dense


def test_by_name(monkeypatch):
    with torch.inference_mode():
        rows = list(steps.run("cpu", STEP.name))
    assert [row["recipe"] for row in rows] == [None, "near"]
    assert all(row["ms"] > 0 for row in rows)
    monkeypatch.setattr(steps.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="whole transformers need diffusers"):
        next(steps.run("cpu", STEP.name))
