"""Adapters in files: what is read is LoRA of linear layers and nothing else; what is not is named."""

import json
import pickle

import lora_files
import pytest
import torch
from safetensors.torch import load_file, save_file

from dit_accel.patterns import Clear
from dit_accel.recipe import adapter as module
from dit_accel.recipe.adapter import Adapter
from dit_accel.recipe.recipe import Recipe

PAIR = {
    "blocks.0.to_q": (torch.ones(2, 4), torch.ones(6, 2)),
    "blocks.0.to_k": (torch.ones(2, 4), torch.ones(4, 2)),
}


@pytest.fixture
def folder(tmp_path):
    module.write(tmp_path / "lora", PAIR, 3.0)
    return tmp_path / "lora"


def weights(folder):
    return load_file(folder / module.WEIGHTS)


def change(folder, **values):
    path = folder / module.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_is_written_is_read(folder):
    found = Adapter(folder)
    own = found.parts[""]
    assert {n: (x.rank, x.inputs, x.outputs, x.scale) for n, x in own.layers.items()} == {
        "blocks.0.to_q": (2, 4, 6, 1.5),
        "blocks.0.to_k": (2, 4, 4, 1.5),
    }
    for name, pair in own.tensors().items():
        assert all(map(torch.equal, pair, PAIR[name]))


def test_scales_are_pefts(folder):
    change(folder, use_rslora=True)
    assert Adapter(folder).parts[""].layers["blocks.0.to_q"].scale == pytest.approx(3 / 2**0.5)


def test_peft_reads_and_writes_the_same(folder, tmp_path):
    peft = pytest.importorskip("peft")
    net = torch.nn.Sequential()
    net.blocks = torch.nn.ModuleList(
        [torch.nn.ModuleDict({"to_q": torch.nn.Linear(4, 6), "to_k": torch.nn.Linear(4, 4)})]
    )
    model = peft.PeftModel.from_pretrained(net, folder)
    model.save_pretrained(tmp_path / "again")
    assert Adapter(tmp_path / "again").parts[""].layers == Adapter(folder).parts[""].layers
    again = Adapter(tmp_path / "again").parts[""].tensors()
    assert all(torch.equal(again[name][0], PAIR[name][0]) for name in PAIR)


def test_files_of_diffusers(tmp_path):
    """Keys may name the transformer; without metadata alpha is the rank."""
    path = tmp_path / "lora.safetensors"
    pairs = {f"{t}.to_q.lora_{x}.weight": torch.ones(2, 2) for t in module.TRANSFORMERS for x in "AB"}
    save_file(pairs, path)
    found = Adapter(path)
    assert list(found.parts) == ["transformer", "transformer_2"]
    assert found.parts["transformer_2"].layers["to_q"].scale == 1
    said = json.dumps({"transformer.lora_alpha": 8, "transformer.peft_type": "LORA"})
    save_file(pairs, path, {"lora_adapter_metadata": said})
    assert [part.layers["to_q"].scale for part in Adapter(path).parts.values()] == [4, 1]
    for said, why in (("{", "no JSON: Expecting"), ("[]", "no object")):
        save_file(pairs, path, {"lora_adapter_metadata": said})
        with pytest.raises(ValueError, match=rf"lora.safetensors is damaged: its `.*metadata` is {why}"):
            Adapter(path)


@pytest.mark.parametrize("told", [[], "x", {"a": 3}, {"a": None, "b": "c"}, {}, None])
def test_an_index_that_names_no_files(tmp_path, told):
    (tmp_path / module.MODEL_CONFIG).write_text("{}")
    (tmp_path / f"{module.MODEL_WEIGHTS}.index.json").write_text(json.dumps({"weight_map": told}))
    with pytest.raises(ValueError, match=r"without its weights: .*index\.json names no files"):
        Adapter(tmp_path)


def test_two_transformers(folder, tmp_path):
    two = ("transformer", "transformer_2")
    with pytest.raises(ValueError, match="does not say for which transformer it is"):
        Adapter(folder).parts_of(two)
    folder.rename(tmp_path / "both")
    (tmp_path / "both" / "transformer_2").mkdir()
    for name in (module.CONFIG, module.WEIGHTS):
        (tmp_path / "both" / name).rename(tmp_path / "both" / "transformer_2" / name)
    found = Adapter(tmp_path / "both")
    assert list(found.parts_of(two)) == ["transformer_2"]
    with pytest.raises(ValueError, match="there is no transformer_2 here"):
        found.parts_of(("transformer",))


BAD = {
    "nothing": (lambda f: [p.unlink() for p in f.iterdir()], "has no adapter_config.json"),
    "no config": (lambda f: (f / module.CONFIG).unlink(), "has no adapter_config.json"),
    "no weights": (lambda f: (f / module.WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "pickle": (lambda f: (f / module.WEIGHTS).rename(f / "adapter_model.bin"), "is pickled, and could run"),
    "a pickle by another name": (
        lambda f: (f / module.WEIGHTS).write_bytes(pickle.dumps({})),
        "is not a safetensors file",
    ),
    "cut off": (
        lambda f: (f / module.WEIGHTS).write_bytes((f / module.WEIGHTS).read_bytes()[:-9]),
        "is not a safetensors file",
    ),
    "another key": (
        lambda f: save_file({**weights(f), "blocks.0.to_q.diff": torch.ones(1)}, f / module.WEIGHTS),
        r"key 'blocks.0.to_q.diff', which is no LoRA",
    ),
    "half a pair": (
        lambda f: save_file(dict([*weights(f).items()][1:]), f / module.WEIGHTS),
        "has no lora_A of blocks.0.to_k",
    ),
    "no pair": (lambda f: save_file({}, f / module.WEIGHTS), "holds no LoRA"),
    "convolution": (
        lambda f: save_file({k: v[..., None] for k, v in weights(f).items()}, f / module.WEIGHTS),
        "not those of linear layers",
    ),
    "integers": (
        lambda f: save_file({k: v.int() for k, v in weights(f).items()}, f / module.WEIGHTS),
        "save it in 16 or 32 bit floats",
    ),
    "DoRA": (lambda f: change(f, use_dora=True), "LoRA with `use_dora` is not supported"),
    "biases": (lambda f: change(f, bias="all"), "LoRA with `bias` is not supported"),
    "own alphas": (lambda f: change(f, alpha_pattern={"to_q": 2}), "LoRA with `alpha_pattern`"),
    "IA3": (lambda f: change(f, peft_type="IA3"), "must be LoRA, got `peft_type` 'IA3'"),
    "no number": (lambda f: change(f, lora_alpha="8"), "`lora_alpha` must be a number"),
    "no JSON": (lambda f: (f / module.CONFIG).write_text("{"), "cannot be read as PEFT's configuration"),
}


@pytest.mark.parametrize(("damage", "message"), BAD.values(), ids=BAD)
def test_what_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        Recipe(Clear(3), adapter=folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("name", ["none", "", "a" * 5000, "none\0", "/dev/zero", "~nobody/x"])
def test_names_of_nothing(name, tmp_path):
    with pytest.raises(ValueError, match=r"adapter|null"):
        Recipe.from_dict({"attention": "Dense", "adapter": name}, tmp_path)
    with pytest.raises((ValueError, TypeError)):
        Recipe(Clear(3), adapter=[name])


def test_numbers_are_checked_when_they_act(folder):
    part = Recipe(Clear(3), adapter=folder).adapter.parts[""]
    save_file({k: v * float("nan") for k, v in weights(folder).items()}, folder / module.WEIGHTS)
    with pytest.raises(ValueError, match="is not finite"):
        part.tensors()
    save_file({k: v.repeat(2, 2) for k, v in weights(folder).items()}, folder / module.WEIGHTS)
    with pytest.raises(ValueError, match="has changed since the recipe was made"):
        part.tensors()


# -- recipes -------------------------------------------------------------------------------------------------


def test_files_are_relative_to_the_recipe(folder, tmp_path):
    (tmp_path / "mine.yaml").write_text("attention: {pattern: Clear, radius: 3}\nadapter: lora")
    found = Recipe.load(tmp_path / "mine.yaml")
    assert found == Recipe(Clear(3), adapter=folder)
    assert found != Recipe(Clear(3))
    assert "+adapter-" in found.tag
    found.save(tmp_path / "sub" / "again.yaml")
    assert Recipe.load(tmp_path / "sub" / "again.yaml") == found
    change(folder, lora_alpha=4)
    assert Recipe.load(tmp_path / "mine.yaml") != found


def test_bundled_names(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BUNDLED", tmp_path)
    recipe = Recipe(Clear(3), adapter="lora")
    assert recipe.adapter.path == folder
    assert Recipe.from_yaml(recipe.to_yaml(), "elsewhere") == recipe
    assert "adapter: lora\n" in recipe.to_yaml()
    with pytest.raises(ValueError, match="no such file or folder; the bundled ones are lora"):
        Recipe(Clear(3), adapter="other")


def test_projections_of_a_family_are_all_linear(wan):
    """What the helper of other tests draws LoRA for."""
    assert len(lora_files.linears(wan.pipe.transformer)) == 12
