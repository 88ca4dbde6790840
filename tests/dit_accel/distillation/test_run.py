"""Distillations from the first sample to the adapter: resumed, loaded, unloaded, refused."""

from dataclasses import replace

import distillations
import pytest
import torch
from left_behind import state_of
from peft import LoraConfig

import dit_accel
from dit_accel import Recipe, UnavailableError, accelerated
from dit_accel.distillation import progress, run
from dit_accel.errors import NonFiniteError
from dit_accel.json_files import read_json
from dit_accel.patterns import ByNoise, Clear, Dense, InLine, Neighborhood, SparseLinear, VideoSparse
from dit_accel.recipe.adapter import WEIGHTS
from dit_accel.recipe.adapter_parts import Whole


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def distilled(pipe, family, folder, recipe=distillations.RECIPE, **options):
    settings = {**distillations.SMALL, "folder": folder / "state", **options}
    call, prompts = distillations.call(family), distillations.prompts(family)
    return dit_accel.distill(pipe, recipe, prompts, folder / "out", call=call, **settings)


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "hunyuan"])
def test_every_family_comes_nearer_to_its_teacher(families, tmp_path, name):
    pipe = families[name].make()
    transformer = pipe.transformer
    before, weights = state_of(transformer), {k: v.clone() for k, v in transformer.state_dict().items()}
    recipe = replace(distillations.RECIPE if name == "sd3" else distillations.POOLED, dense_steps=0)
    options = {"steps": 16, "flow": 0, "rank": None if name == "wan" else 4}
    options |= {"rate": 0.003} if name in ("wan", "hunyuan") else {}
    said = distilled(pipe, name, tmp_path, recipe, checkpointing=name in ("flux", "wan"), **options)
    assert said["error"] < 0.97 * said["error_without"]
    assert read_json(tmp_path / "out" / "made_by.json") == said
    assert state_of(transformer) == before
    assert all(torch.equal(x, weights[k]) for k, x in transformer.state_dict().items())
    assert all(p.requires_grad for p in transformer.parameters())
    (part,) = Recipe(recipe.attention, adapter=tmp_path / "out").adapter.parts.values()
    assert part.whole == (name == "wan")
    assert bool(part.learned) == (name != "sd3")


STUDENTS = {
    "sparse-linear": (SparseLinear(0.2, block_size=(16, 16)), {"rank": 2, "rate": 0.01}),
    "sparse-linear-all": (SparseLinear(0.2, "all", block_size=(16, 16)), {"rank": None, "rate": 0.01}),
    "inline": (InLine(), {"rank": None, "rate": 0.003}),
    "video-sparse": (VideoSparse(0.2, (2, 4, 2)), {"rank": None, "rate": 0.01}),
}


@pytest.mark.parametrize(("pattern", "options"), STUDENTS.values(), ids=STUDENTS)
def test_students_learn_what_they_have_beside_projections(wan, tmp_path, pattern, options):
    """From 0, and what is loaded is what was measured; whole weights and learned ones are in one file."""
    recipe = Recipe(pattern, dense_steps=0)
    pipe = wan.make()
    if pattern == InLine():  # nearly exact where all keys weigh alike, as in a model that has learned nothing
        for block in pipe.transformer.blocks:
            block.attn1.norm_q.weight.data.fill_(3)
            block.attn1.norm_k.weight.data.fill_(3)
    said = distilled(pipe, "wan", tmp_path, recipe, steps=12, flow=0, **options)
    assert said["error"] < said["error_without"]
    loaded = replace(recipe, adapter=tmp_path / "out")
    (part,) = loaded.adapter.parts.values()
    learned = part.learned_weights()
    assert learned.keys() == {f"blocks.{n}.attn1" for n in range(len(pipe.transformer.blocks))}
    assert all(x.any() for own in learned.values() for x in own.values())
    untouched = wan.run(pipe, steps=1)
    with accelerated(pipe, loaded):
        assert not torch.equal(wan.run(pipe, steps=1), untouched)
    assert torch.equal(wan.run(pipe, steps=1), untouched)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flux", {"rank": 2}),
        ("flux", {"rank": None, "checkpointing": True, "precision": "bf16", "average": 0}),
        ("wan", {"rank": 2, "at_once": 2}),
    ],
    ids=["lora", "whole", "video"],
)
def test_killed_and_resumed_it_ends_with_the_same_weights(families, tmp_path, monkeypatch, name, options):
    """Some steps after a checkpoint, which are made again."""
    make, options = families[name].make, {"steps": 7, "save_every": 2, **options}
    whole = distilled(make(), name, tmp_path / "whole", distillations.POOLED, **options)
    show = progress.Progress.step

    def killed(self, done):
        if done == 5:
            raise KeyboardInterrupt
        show(self, done)

    monkeypatch.setattr(progress.Progress, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        distilled(make(), name, tmp_path / "parts", distillations.POOLED, **options)
    assert not (tmp_path / "parts" / "out").exists()
    monkeypatch.setattr(progress.Progress, "step", show)
    resumed = distilled(make(), name, tmp_path / "parts", distillations.POOLED, **options)
    assert resumed == whole
    assert files_of(tmp_path / "whole" / "out") == files_of(tmp_path / "parts" / "out")


@pytest.mark.parametrize("rank", [2, None], ids=["lora", "whole"])
def test_what_is_loaded_is_what_was_trained(flux, tmp_path, rank):
    recipe, transformer = distillations.POOLED, flux.pipe.transformer
    untouched, inputs = flux.run(flux.pipe, steps=1), flux.inputs(flux.pipe)
    job = distillations.distillation(flux.pipe, "flux", tmp_path, recipe, rank=rank, steps=3)
    job.run(progress=False, until=None)

    def output():
        with torch.no_grad():
            return transformer(**{**inputs, "return_dict": False})[0]

    with job.student.enabled():
        expected = output()
    job.close()
    assert not torch.allclose(expected, output(), atol=1e-3)
    loaded = Recipe(recipe.attention, order=recipe.order, block_size=(16, 16), adapter=tmp_path / "out")
    with accelerated(transformer, loaded) as handle:
        assert torch.equal(output(), expected)
        assert isinstance(next(iter(loaded.adapter.parts[""].layers.values())), Whole) == (rank is None)
        assert "pooling weights of 4 layers" in handle.bindings["transformer"].adapted.describe()
    assert torch.equal(flux.run(flux.pipe, steps=1), untouched)


def test_it_stops_where_it_is_told_and_settings_stay(flux, tmp_path):
    assert "error" not in distilled(flux.pipe, "flux", tmp_path, until=2)
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        ValueError, match="begun with another `rank`, 2, not 3; use the same settings, or give"
    ):
        distilled(flux.pipe, "flux", tmp_path, rank=3)
    distilled(flux.pipe, "flux", tmp_path)
    once = files_of(tmp_path / "out")
    distilled(flux.pipe, "flux", tmp_path)  # again: what is there is written again
    assert files_of(tmp_path / "out") == once


def test_it_goes_on_for_more_steps_and_not_for_fewer(flux, tmp_path):
    """It ends neither with what it had nor as a run of as many steps does, whose rate fell later."""
    distilled(flux.pipe, "flux", tmp_path, steps=2)
    short = files_of(tmp_path / "out")
    assert distilled(flux.pipe, "flux", tmp_path, steps=4)["steps"] == 4
    longer = files_of(tmp_path / "out")
    distilled(flux.pipe, "flux", tmp_path / "other", steps=4)
    assert len({files[WEIGHTS] for files in (short, longer, files_of(tmp_path / "other" / "out"))}) == 3
    with pytest.raises(ValueError, match="begun with another `steps`, 4, not 3"):
        distilled(flux.pipe, "flux", tmp_path, steps=3)
    with pytest.raises(ValueError, match="begun with another `rank`, 2, not 3"):
        distilled(flux.pipe, "flux", tmp_path, steps=5, rank=3)


def test_it_goes_on_with_the_weights_it_was_begun_with(families, tmp_path):
    """Of all modules where samples are made."""
    begun = families["flux"].make()
    said = distilled(begun, "flux", tmp_path, until=1)
    other = families["flux"].make()
    with torch.no_grad():
        other.transformer.proj_out.bias += 1e-3
    with pytest.raises(ValueError, match=r"was begun with another `weights`.*, or give another folder"):
        distilled(other, "flux", tmp_path)
    assert distilled(families["flux"].make(), "flux", tmp_path, until=2)["weights"] == said["weights"]
    (tmp_path / "state" / "distillation.json").unlink()
    with pytest.raises(ValueError, match="were made with another `weights`"):
        distilled(other, "flux", tmp_path)


def test_precision_is_that_of_the_device_and_stays_that_of_the_run(flux, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="dit_accel")
    options = {"precision": "auto", "steps": 2}
    for fast, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(run, "multiplies_bf16", lambda device, fast=fast: fast)
        said = distilled(flux.pipe, "flux", tmp_path / precision, **options, until=1)
        assert said["precision"] == precision
        monkeypatch.setattr(run, "multiplies_bf16", lambda device, fast=fast: not fast)
        assert distilled(flux.pipe, "flux", tmp_path / precision, **options)["precision"] == precision
        said = [text for text in caplog.messages if "computes" in text]
        assert said == [f"distillation computes in {precision} on cpu"] * 2
        caplog.clear()
    with pytest.raises(ValueError, match="begun with another `precision`, 'fp32', not 'bf16'"):
        distilled(flux.pipe, "flux", tmp_path / "fp32", **{**options, "precision": "bf16"})


def test_steps_that_are_dense_are_trained_dense(flux, tmp_path):
    """Then the student without its adapter is the teacher."""
    dense = Recipe(Clear(1), dense_steps=1.0, block_size=(16, 16))
    said = distilled(flux.pipe, "flux", tmp_path, dense, steps=2, flow=0, rate=0.0)
    assert said["error"] == said["error_without"] == 0


def test_prodigy(flux, tmp_path):
    pytest.importorskip("prodigyopt")
    options = {"optimizer": "prodigy", "rate": None, "steps": 6, "save_every": 2}
    whole = distilled(flux.pipe, "flux", tmp_path / "whole", **options)
    distilled(flux.pipe, "flux", tmp_path / "parts", **options, until=3)
    assert distilled(flux.pipe, "flux", tmp_path / "parts", **options) == whole
    assert files_of(tmp_path / "whole" / "out") == files_of(tmp_path / "parts" / "out")


def test_the_parts_of_the_loss_are_shown_and_logged(flux, tmp_path, capsys):
    """In the bar, and in a log of which TensorBoard's writer is asked for."""
    pytest.importorskip("tensorboard")
    distilled(flux.pipe, "flux", tmp_path, log=tmp_path / "log", progress=True)
    (events,) = (tmp_path / "log").iterdir()
    for name in (b"loss", b"flow", b"prediction", b"attention"):
        assert name in events.read_bytes()
    shown = capsys.readouterr().err
    assert all(f"{name}=" in shown for name in ("loss", "flow", "prediction", "attention"))


@pytest.mark.parametrize(("option", "value"), [("optimizer", "prodigy"), ("log", "somewhere")])
def test_missing_packages_are_named_before_any_work(flux, tmp_path, monkeypatch, option, value):
    def missing(name):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr("dit_accel.optional.import_module", missing)
    with pytest.raises(UnavailableError, match=r"is not installed: pip install 'dit-accel\[distill\]'"):
        distilled(flux.pipe, "flux", tmp_path, **{option: value})
    assert not list(tmp_path.iterdir())


REFUSED = {
    "quantized": (Recipe(Clear(1), quantization="int8"), {}, UnavailableError, "has no gradients"),
    "a backend": (Recipe(Clear(1), backend="flex"), {}, UnavailableError, "cannot be trained here"),
    "by noise": (Recipe(ByNoise({0.5: Dense(), 0: Clear(1)})), {}, ValueError, "change with the noise level"),
    "dense": (Recipe(Dense()), {}, ValueError, "there is nothing to train"),
    "another family": (Recipe(Neighborhood(3), family="wan"), {}, ValueError, "is for the family 'wan'"),
    "two factors": (
        Recipe({"all": Clear(1, downsample=2), "heads.1": Clear(1, downsample=3)}),
        {},
        UnavailableError,
        "one set of pooling weights",
    ),
    "taps": (distillations.RECIPE, {"taps": ("single.9",)}, ValueError, "names the layer 'single.9'; layers"),
    "train": (distillations.RECIPE, {"train": ("to_z",)}, ValueError, "`train` names 'to_z', which no"),
    "steps": (distillations.RECIPE, {"steps": 0}, ValueError, "`steps` must be a positive integer, got 0"),
    "rank": (distillations.RECIPE, {"rank": 0}, ValueError, "`rank` must be a positive integer, got 0"),
    "nothing": (distillations.RECIPE, dict.fromkeys(run.PARTS, 0), ValueError, "must be above 0"),
    "optimizer": (distillations.RECIPE, {"optimizer": "sgd"}, ValueError, "must be 'adamw' or 'prodigy'"),
    "share": (distillations.RECIPE, {"average": 1.0}, ValueError, "`average` must be a share from 0"),
    "until 0": (distillations.RECIPE, {"until": 0}, ValueError, "`until` must be a positive integer, got 0"),
    "until below": (distillations.RECIPE, {"until": -1}, ValueError, "`until` must be a positive integer"),
    "until part": (distillations.RECIPE, {"until": 1.5}, ValueError, "`until` must be a positive integer"),
    "unknown": (distillations.RECIPE, {"epochs": 3}, TypeError, "epochs"),
}


@pytest.mark.parametrize(("recipe", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_before_any_work(flux, tmp_path, recipe, options, error, message):
    before = state_of(flux.pipe.transformer)
    with pytest.raises(error, match=message):
        distilled(flux.pipe, "flux", tmp_path, recipe, **options)
    assert not list(tmp_path.iterdir())
    assert state_of(flux.pipe.transformer) == before
    assert all(p.requires_grad for p in flux.pipe.transformer.parameters())


@pytest.mark.parametrize("wrapped", [["to_q"], ["to_q", "to_k", "to_v", "to_out.0"]], ids=["some", "all"])
def test_layers_in_peft_are_not_left_out(families, tmp_path, wrapped):
    pipe = families["flux"].make()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=wrapped))
    with pytest.raises(UnavailableError, match=r"attn\.to_q is a peft.* would be left out; unload LoRA"):
        distilled(pipe, "flux", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["folder", "log"])
@pytest.mark.parametrize("inside", ["out", "out/more", "other/../out"])
def test_nothing_else_may_be_where_the_adapter_is(flux, tmp_path, name, inside):
    """Or a run that was stopped would refuse what it has written itself."""
    with pytest.raises(ValueError, match=f"`{name}` .* is in `out` .*; name another folder"):
        dit_accel.distill(
            flux.pipe,
            distillations.RECIPE,
            distillations.prompts("flux"),
            tmp_path / "out",
            call=distillations.call("flux"),
            **{**distillations.SMALL, name: tmp_path / inside},
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dense", [0, 1.0])
@pytest.mark.parametrize(("steps", "what"), [(4, "the loss of step 2 is"), (1, "what was trained is")])
def test_training_that_diverges_writes_no_adapter(flux, tmp_path, dense, steps, what):
    recipe = replace(distillations.RECIPE, dense_steps=dense)
    options = {"steps": steps, "rate": 1e38 if steps > 1 else 1e308, "weight_decay": 0, "flow": 1}
    with pytest.raises(NonFiniteError, match=f"{what} not finite: .* lower `rate` than 1e"):
        distilled(flux.pipe, "flux", tmp_path, recipe, **options)
    assert not (tmp_path / "out").exists()
    assert not flux.pipe.transformer._forward_hooks


def test_a_schedulers_step_of_the_users_stays(flux, tmp_path):
    """Samples look at it, and put back what was there."""
    own, calls = flux.pipe.scheduler.step, []

    def counted(*args, **kwargs):
        calls.append(args)
        return own(*args, **kwargs)

    flux.pipe.scheduler.step = counted
    distilled(flux.pipe, "flux", tmp_path, until=1)
    assert flux.pipe.scheduler.step is counted
    assert len(calls) == 6  # two of each sample


def test_data_and_pipelines_that_are_refused(families, flux, tmp_path):
    for data, error, message in (
        ([], ValueError, "must have at least one prompt"),
        (tmp_path / "none.txt", ValueError, "no such file or folder"),
        ([3], TypeError, "must be prompts, or the path"),
    ):
        with pytest.raises(error, match=message):
            dit_accel.distill(flux.pipe, distillations.RECIPE, data, tmp_path / "out", **distillations.SMALL)
    with pytest.raises(ValueError, match="`held_out` is 3, and there are 3 samples"):
        distilled(flux.pipe, "flux", tmp_path, held_out=3)
    with pytest.raises(ValueError, match="`empty` must be 0 where prompts are not texts"):
        distilled(flux.pipe, "flux", tmp_path, empty=0.1)
    with pytest.raises(UnavailableError, match="with one transformer"):
        distilled(families["wan"].make(two=True), "wan", tmp_path / "two")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match=r"has 'thesis.txt' in it, which is of no adapter; name a new"):
        dit_accel.distill(flux.pipe, distillations.RECIPE, [{}], tmp_path / "mine", **distillations.SMALL)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder, got the file"):
        dit_accel.distill(flux.pipe, distillations.RECIPE, [{}], tmp_path / "file", **distillations.SMALL)
