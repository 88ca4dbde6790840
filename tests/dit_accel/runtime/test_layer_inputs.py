"""What patterns read of a layer's input, in models: the gates of VSA, from a FastWan model's own folder."""

import json

import pytest
import torch
from left_behind import state_of
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from dit_accel import UnavailableError, accelerated, disable, enable, summary
from dit_accel.attention import video_sparse
from dit_accel.attention.transformer_call import TransformerCall
from dit_accel.patterns import Clear, InLine, Neighborhood, VideoSparse
from dit_accel.pipelines import family_of, load
from dit_accel.recipe import adapter
from dit_accel.recipe.adapter import Adapter
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.layer_inputs import layer_sizes

PATTERN = VideoSparse(0.3, (2, 4, 2))
GATE = "to_gate_compress"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def gates_of(transformer, scale: float = 0.2) -> dict[str, torch.Tensor]:
    """As FastWan names them, at the level of blocks."""
    generator, dim = torch.Generator().manual_seed(3), transformer.blocks[0].attn1.to_q.in_features
    shapes = {"weight": (dim, dim), "bias": (dim,)}
    return {
        f"blocks.{n}.{GATE}.{name}": scale * torch.randn(shape, generator=generator)
        for n in range(len(transformer.blocks))
        for name, shape in shapes.items()
    }


def fast_wan(wan, folder, drop=(), add=None, parts: int = 1):
    """A pipeline's folder with gates among its transformer's weights, in one file or several by an index."""
    wan.pipe.save_pretrained(folder)
    file = folder / "transformer" / WEIGHTS
    tensors = load_file(file) | gates_of(wan.pipe.transformer) | (add or {})
    tensors = {name: x for name, x in tensors.items() if name not in drop}
    if parts == 1:
        save_file(tensors, file, metadata={"format": "pt"})
        return folder
    file.unlink()
    names = sorted(tensors)
    index = {}
    for part in range(parts):
        own = names[part::parts]
        name = f"diffusion_pytorch_model-{part + 1:05}-of-{parts:05}.safetensors"
        save_file({key: tensors[key] for key in own}, file.parent / name, metadata={"format": "pt"})
        index |= dict.fromkeys(own, name)
    total = {"total_size": sum(x.nbytes for x in tensors.values())}
    text = json.dumps({"metadata": total, "weight_map": index})
    (file.parent / f"{WEIGHTS}.index.json").write_text(text)
    return folder


@pytest.mark.parametrize("parts", [1, 2])
def test_a_fast_wan_folder_loads_and_runs(wan, tmp_path, monkeypatch, parts):
    """The gates are those of the folder, of each token's own input, in whatever order tokens stand."""
    folder = fast_wan(wan, tmp_path / "fastwan", parts=parts)
    pipe, seen, calls = load(folder, vae=None, text_encoder=None, tokenizer=None), {}, []
    untouched = wan.run(pipe, steps=1)
    before = state_of(pipe.transformer)
    compute = video_sparse.VideoSparseAttention.__call__

    def watched(self, call):
        calls.append(call)
        return compute(self, call)

    monkeypatch.setattr(video_sparse.VideoSparseAttention, "__call__", watched)
    gates = gates_of(pipe.transformer)
    recipe = Recipe({"all": PATTERN, "heads.1": Neighborhood((3, 3, 3))}, order="hilbert", adapter=folder)
    with accelerated(pipe, recipe):
        assert "gates of the coarse branch of" in str(summary(pipe))
        hooks = [
            block.attn1.to_q.register_forward_pre_hook(lambda _, args, n=n: seen.update({n: args[0]}))
            for n, block in enumerate(pipe.transformer.blocks)
        ]
        out = wan.run(pipe, steps=1)
        for hook in hooks:
            hook.remove()
    assert len(calls) == len(pipe.transformer.blocks) == len(seen)
    others = [head for head in range(pipe.transformer.config.num_attention_heads) if head != 1]
    for n, call in enumerate(calls):
        gate = seen[n] @ gates[f"blocks.{n}.{GATE}.weight"].T + gates[f"blocks.{n}.{GATE}.bias"]
        expected = gate.unflatten(2, (len(others) + 1, -1)).transpose(1, 2)[:, others]
        torch.testing.assert_close(call.beside, expected)
    with accelerated(pipe, Recipe(recipe.attention, order="hilbert")):
        assert not torch.allclose(wan.run(pipe, steps=1), out, atol=1e-4)
    assert state_of(pipe.transformer) == before
    assert torch.equal(wan.run(pipe, steps=1), untouched)


def test_where_tokens_stand_changes_nothing(wan, tmp_path):
    folder = fast_wan(wan, tmp_path / "fastwan")
    outs = []
    for order in ("raster", "hilbert"):
        with accelerated(wan.pipe, Recipe({"all": PATTERN, "0": Clear(2)}, order=order, adapter=folder)):
            outs.append(wan.run(wan.pipe, steps=1, cfg=3.0, batch=2))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


def test_beside_lora_that_is_loaded_later(wan, tmp_path):
    """PEFT puts its layer around the projection; the gate is that of the same input."""
    folder = fast_wan(wan, tmp_path / "fastwan")
    pipe = wan.make()
    enable(pipe, Recipe(PATTERN, adapter=folder))
    expected = wan.run(pipe, steps=1)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))  # whose B is 0
    torch.testing.assert_close(wan.run(pipe, steps=1), expected)
    disable(pipe)


def test_what_does_not_fit_is_named(wan, tmp_path):
    transformer = wan.pipe.transformer
    before = state_of(transformer)
    cases = {
        "other": (
            {"add": {"blocks.0.to_other.weight": torch.ones(2)}},
            r"weight blocks\.0\.to_other\.weight",
        ),
        "no bias": (
            {"drop": {f"blocks.1.{GATE}.bias"}},
            r"layer blocks\.1 takes gates .* was made for another",
        ),
        "none": (
            {"drop": {f"blocks.1.{GATE}.bias", f"blocks.1.{GATE}.weight"}},
            r"layer blocks\.1 takes gates of the coarse branch of .* has none for it",
        ),
        "another size": (
            {"add": {f"blocks.0.{GATE}.weight": torch.ones(3, 3)}},
            r"layer blocks\.0 takes gates of the coarse branch of .* of 3 x 3 for it",
        ),
        "no gates": ({"drop": set(gates_of(transformer))}, r"have none that a pattern learns"),
    }
    for name, (options, message) in cases.items():
        folder = fast_wan(wan, tmp_path / name, **options)
        with pytest.raises(ValueError, match=message):
            enable(wan.pipe, Recipe(PATTERN, adapter=folder))
    with pytest.raises(
        ValueError, match=r"gates of .* which no layer of this recipe takes; use `VideoSparse"
    ):
        enable(wan.pipe, Recipe(Clear(2), adapter=fast_wan(wan, tmp_path / "good")))
    (tmp_path / "good" / "transformer" / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=rf"without its weights: it has no {WEIGHTS}"):
        Adapter(tmp_path / "good" / "transformer")
    assert state_of(transformer) == before


def test_gates_alone_are_what_an_adapter_of_a_model_is(wan, tmp_path):
    """Another copy with other base weights is the same adapter; the transformer's own folder is one too."""
    folder = fast_wan(wan, tmp_path / "a")
    other = fast_wan(
        wan, tmp_path / "b", add={"proj_out.bias": torch.zeros_like(wan.pipe.transformer.proj_out.bias)}
    )
    assert Adapter(folder) == Adapter(other)
    assert (
        Adapter(folder / "transformer").parts[""].describe()
        == Adapter(folder).parts["transformer"].describe()
    )


READING = pytest.mark.parametrize(
    "pattern", [VideoSparse(0.3, (1, 4, 4)), InLine()], ids=["gates", "kernels"]
)


def learned_by(flux, pattern, folder) -> Recipe:
    """With an adapter of what the pattern learns, as it is before training."""
    transformer = flux.pipe.transformer
    family, places = family_of(transformer), {module: name for name, module in transformer.named_modules()}
    sizes = family.heads(transformer)
    learned = {
        places[module]: pattern.learned(layer_sizes(family, module, *sizes))
        for module in family.found_layers(transformer).values()
    }
    adapter.write_weights(folder, {}, learned=learned)
    return Recipe(pattern, adapter=folder)


@READING
def test_a_part_of_the_input_is_refused(flux, tmp_path, monkeypatch, pattern):
    """As processes that share a call have it."""
    pipe = flux.make()
    expected = flux.run(pipe, steps=1)
    with accelerated(pipe, learned_by(flux, pattern, tmp_path / "gates")):
        with monkeypatch.context() as patched:
            patched.setattr(TransformerCall, "shards_of", lambda call, layer: object())
            with pytest.raises(
                UnavailableError, match=r"have a part each; use one process, or leave `adapter`"
            ):
                flux.run(pipe, steps=1)
        flux.run(pipe, steps=1)
    assert torch.equal(flux.run(pipe, steps=1), expected)


@READING
def test_fused_projections_are_refused(flux, tmp_path, pattern):
    pipe = flux.make()
    with accelerated(pipe, learned_by(flux, pattern, tmp_path / "gates")):
        flux.run(pipe, steps=1)
        pipe.transformer.fuse_qkv_projections()
        with pytest.raises(UnavailableError, match=r"call `unfuse_qkv_projections\(\)`"):
            flux.run(pipe, steps=1)


def test_in_compiled_blocks_the_graph_breaks(wan, tmp_path):
    """Where the layer's input is read; what is computed is the same."""
    folder = fast_wan(wan, tmp_path / "fastwan")
    pipe = wan.make()
    with accelerated(pipe, Recipe(PATTERN, adapter=folder)):
        expected = wan.run(pipe, steps=2)
        for block in pipe.transformer.blocks:
            block.compile(backend="eager")
        torch.testing.assert_close(wan.run(pipe, steps=2), expected)
