"""The perturbed model alone, against diffusers' processors over explicit attention maps, in float64."""

import pytest
import torch

from dit_accel.attention.head_ordered import HeadOrdered
from dit_accel.errors import UnavailableError
from dit_accel.guidance import HeadPerturbation
from dit_accel.patterns import Clear, Dense, Neighborhood, SparseVideoGen
from dit_accel.pipelines import family_of
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, disable, enable, handle_of

FAMILIES = pytest.mark.parametrize("family", ["flux", "sd3", "wan", "hunyuan", "hunyuan15"])
HEADS = {(0, 1): 1.0, (2, 0): 0.5}
KINDS = {
    "soft_pag": {},
    "pag": {"heads": [0, 2]},
    "uniform": {},
    "seg": {"sigma": 0.7},
    "temperature": {"temperature": 3.0},
}


def perturbation(kind="soft_pag", **options) -> HeadPerturbation:
    return HeadPerturbation(**{"heads": HEADS, "kind": kind, **KINDS[kind], **options})


def sparse(case):
    return Clear(3) if case.grid[0] == 1 else Neighborhood((3, 3, 3))


def predict(transformer, inputs) -> torch.Tensor:
    with torch.no_grad():
        return transformer(**inputs)[0]


def close(case, actual, expected):
    """In fp64; Wan rounds to fp32 before every layer, so that a last bit of fp64 may turn one of fp32."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6 if case.name == "wan" else 1e-12)


@FAMILIES
@pytest.mark.parametrize("tokens", ["all", "image"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_explicit_maps(case, kind, tokens):
    inputs, guidance = case.inputs(), perturbation(kind, tokens=tokens)
    transformer = case.make().transformer.double()
    untouched = predict(transformer, inputs)
    with guidance.applied(transformer):
        actual = predict(transformer, inputs)
    expected = predict(case.explain(case.make().transformer.double(), guidance), inputs)
    close(case, actual, expected)
    assert (actual - untouched).abs().max() > 1e-3
    assert torch.equal(predict(transformer, inputs), untouched)


@FAMILIES
@pytest.mark.parametrize("tokens", ["all", "image"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_explicit_maps_under_a_sparse_pattern(case, kind, tokens):
    inputs, guidance, pattern = case.inputs(), perturbation(kind, tokens=tokens), sparse(case)
    transformer = case.make().transformer.double()
    enable(transformer, Recipe(pattern, order="hilbert"))
    with guidance.applied(transformer):
        actual = predict(transformer, inputs)
    expected = predict(case.explain(case.make().transformer.double(), guidance, pattern=pattern), inputs)
    close(case, actual, expected)


@FAMILIES
@pytest.mark.parametrize("kind", ["seg", "temperature"])
def test_under_patterns_that_differ_between_heads(case, kind):
    inputs, guidance, patterns = case.inputs(), perturbation(kind), (sparse(case), Dense())
    transformer = case.make().transformer.double()
    enable(transformer, Recipe({"heads.0": patterns[0], "heads.1": patterns[1]}, order="hilbert"))
    with guidance.applied(transformer):
        actual = predict(transformer, inputs)
    expected = case.explain(case.make().transformer.double(), guidance, pattern=patterns)
    close(case, actual, predict(expected, inputs))


@pytest.mark.parametrize("family", ["wan"])
@pytest.mark.parametrize("kind", ["seg", "temperature"])
def test_heads_that_choose_keep_their_choice(case, kind, monkeypatch):
    """O + u (O_kind - O) with O_kind under the mask that the head chose for O."""
    inputs, guidance = case.inputs(), perturbation(kind)
    transformer = case.make().transformer.double()
    enable(transformer, SparseVideoGen(0.4, True, True, block_size=8, profile_frames=2))
    seen, attend = {}, HeadOrdered.__call__

    def spy(self, call):
        chosen = self.resolved(call)
        seen.setdefault(id(call.notes), []).append(chosen.temporal)
        return attend(chosen, call)

    monkeypatch.setattr(HeadOrdered, "__call__", spy)
    with guidance.applied(transformer):
        predict(transformer, inputs)
    twice = [kinds for kinds in seen.values() if len(kinds) == 2]  # in perturbed layers
    assert twice
    assert all(torch.equal(*kinds) for kinds in twice)


@FAMILIES
def test_untouched_heads(case):
    """At the first perturbed layer, the output before its projection differs in the chosen head alone."""
    transformer = case.make().transformer.double()
    inputs, seen = case.inputs(), []
    pattern = Recipe(sparse(case), order="raster")  # the same path with and without
    module = next(iter(family_of(transformer).layers(transformer).values()))
    with module.to_out[0].register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        enable(transformer, pattern)
        predict(transformer, inputs)
        with perturbation().applied(transformer):
            predict(transformer, inputs)
    before, after = (x.unflatten(-1, (2, 16)) for x in seen)
    assert torch.equal(after[:, :, 0], before[:, :, 0])
    assert not torch.allclose(after[:, :, 1], before[:, :, 1], atol=1e-3)


@FAMILIES
def test_restores(case):
    transformer = case.make().transformer
    inputs = case.inputs(torch.float32)
    recipe = Recipe(sparse(case), dense_layers=1)
    handle = enable(transformer, recipe)
    before, processors = predict(transformer, inputs), list(transformer.attn_processors.values())
    with pytest.raises(KeyError), perturbation().applied(transformer):
        raise KeyError
    assert handle_of(transformer) is handle
    assert torch.equal(predict(transformer, inputs), before)
    assert [type(p) for p in transformer.attn_processors.values()] == [type(p) for p in processors]
    disable(transformer)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in transformer.modules())
    registry = getattr(transformer, "_diffusers_hook", None)
    assert registry is None or not registry.hooks


@pytest.mark.parametrize("family", ["sd3"])
@pytest.mark.parametrize("modules", ["attn2", "both"])
def test_second_attention_of_sd35(case, modules):
    inputs, guidance = case.inputs(), perturbation("seg", modules=modules)
    transformer = case.make().transformer.double()
    with guidance.applied(transformer):
        actual = predict(transformer, inputs)
    close(case, actual, predict(case.explain(case.make().transformer.double(), guidance), inputs))


@FAMILIES
def test_schedule_of_a_bare_transformer(case):
    inputs = case.inputs()
    transformer = case.make().transformer.double()
    guidance = perturbation(strength=lambda done: 1 - done)
    with guidance.applied(transformer):
        with pytest.raises(ValueError, match=r"handle\.begin\(steps\)"):
            predict(transformer, inputs)
        handle_of(transformer).begin(4)
        predict(transformer, {**inputs, "timestep": inputs["timestep"] * 2})
        actual = predict(transformer, inputs)
    expected = predict(case.explain(case.make().transformer.double(), guidance, strength=0.75), inputs)
    close(case, actual, expected)


@pytest.mark.parametrize("family", ["flux"])
class TestErrors:
    def test_unknown_processor(self, case):
        class Other:
            pass

        transformer = case.make().transformer
        transformer.transformer_blocks[0].attn.set_processor(Other())
        with (
            pytest.raises(UnavailableError, match=r"layer double\.0 .* attention processor Other"),
            perturbation().applied(transformer),
        ):
            pass

    def test_heads_of_another_model(self, case):
        with pytest.raises(ValueError, match="names layer 9, but this model has 4"):
            enable(case.make(), Recipe(Dense(), guidance=HeadPerturbation([(9, 0)])))

    def test_failed_enable_keeps_what_was_enabled(self, case):
        pipe = case.make()
        with accelerated(pipe, Clear(3)) as handle:
            with pytest.raises(ValueError, match="names head 5"):
                enable(pipe, Recipe(Dense(), guidance=HeadPerturbation([(0, 5)])))
            assert handle_of(pipe) is handle
