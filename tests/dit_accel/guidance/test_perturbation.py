import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.guidance import HeadPerturbation
from dit_accel.patterns import Clear, Dense
from dit_accel.recipe.recipe import Recipe

FLUX = ["double.0", "double.1", "single.0", "single.1"]
SD35 = ["blocks.0", "blocks.1", "blocks.2", "blocks.0.attn2", "blocks.2.attn2"]


class TestHeads:
    def test_flat_layers_double_blocks_first(self):
        heads = HeadPerturbation([(2, 1), (0, 0), [2, 0]]).layers(FLUX, 2)
        assert heads == {"double.0": {0: 1.0}, "single.0": {0: 1.0, 1: 1.0}}

    def test_a_layer_means_all_its_heads(self):
        assert HeadPerturbation([1]).layers(FLUX, 3) == {"double.1": {0: 1.0, 1: 1.0, 2: 1.0}}

    def test_own_strengths(self):
        perturbation = HeadPerturbation({(1, 2): 0.25, 1: 0.5})
        assert perturbation.layers(FLUX, 3) == {"double.1": {0: 0.5, 1: 0.5, 2: 0.25}}

    def test_pag_takes_whole_layers(self):
        assert HeadPerturbation([(1, 2)], kind="pag").layers(FLUX, 3) == HeadPerturbation([1]).layers(FLUX, 3)

    @pytest.mark.parametrize(
        ("modules", "names"),
        [
            ("attn", ["blocks.1", "blocks.2"]),
            ("attn2", ["blocks.2.attn2"]),
            ("both", ["blocks.1", "blocks.2", "blocks.2.attn2"]),
        ],
    )
    def test_second_attention_only_when_selected(self, modules, names):
        heads = [(2, 0)] if modules == "attn2" else [(1, 0), (2, 0)]
        assert list(HeadPerturbation(heads, modules=modules).layers(SD35, 2)) == names

    @pytest.mark.parametrize(
        ("perturbation", "message"),
        [
            (HeadPerturbation([(4, 0)]), "names layer 4, but this model has 4 attention layers"),
            (HeadPerturbation([(0, 2)]), "names head 2, but the layers of this model have 2 heads"),
            (
                HeadPerturbation([(0, 1)], modules="attn2"),
                'layer 0 of this model has no `attn2`; use "attn"',
            ),
        ],
        ids=["layer", "head", "attn2"],
    )
    def test_not_of_this_model(self, perturbation, message):
        with pytest.raises(ValueError, match=message):
            perturbation.layers(FLUX, 2)


class TestStrength:
    def test_range_of_steps(self):
        perturbation = HeadPerturbation([(0, 0)], strength=0.5, start=0.25, stop=0.75)
        assert [perturbation.strength_at(i, 4) for i in range(4)] == [0, 0.5, 0.5, 0]

    def test_schedule(self):
        perturbation = HeadPerturbation([(0, 0)], strength=lambda done: 1 - done)
        assert [perturbation.strength_at(i, 4) for i in range(4)] == [1, 0.75, 0.5, 0.25]

    def test_no_scale_is_no_guidance_but_still_a_perturbed_model(self):
        perturbation = HeadPerturbation([(0, 0)], scale=0)
        assert perturbation.strength_at(0, None) == 0
        assert perturbation.strength_at(0, None, alone=True) == 1

    def test_total_unknown(self):
        assert HeadPerturbation([(0, 0)]).strength_at(3, None) == 1
        with pytest.raises(ValueError, match=r"handle\.begin\(steps\)"):
            HeadPerturbation([(0, 0)], stop=0.5).strength_at(3, None)

    def test_schedule_out_of_range(self):
        with pytest.raises(ValueError, match=r"`strength\(0\.5\)` must be from 0 to 1, got 2"):
            HeadPerturbation([(0, 0)], strength=lambda done: 2).strength_at(1, 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"heads": []}, ValueError, "`heads` is empty"),
        ({"heads": "0,1"}, TypeError, "`heads` must be a list of"),
        ({"heads": [(0, -1)]}, ValueError, "as numbers from 0, got"),
        ({"heads": [(0, 1, 2)]}, ValueError, "as numbers from 0, got"),
        ({"heads": {(0, 0): 1.5}}, ValueError, r"`heads\[\(0, 0\)\]` must be from 0 to 1, got 1.5"),
        ({"kind": "sag"}, ValueError, "`kind` must be one of 'soft_pag', .* got 'sag'"),
        ({"tokens": "text"}, ValueError, "`tokens` must be one of 'all', 'image', got 'text'"),
        ({"modules": "cross"}, ValueError, "`modules` must be one of"),
        ({"strength": 2}, ValueError, "`strength` must be from 0 to 1, got 2"),
        ({"strength": "full"}, TypeError, "`strength` must be a number"),
        ({"scale": float("nan")}, ValueError, "`scale` must be a finite number"),
        ({"sigma": 0}, ValueError, "`sigma` must be a positive number, got 0"),
        ({"kind": "temperature"}, ValueError, "`temperature` belongs to kind='temperature'"),
        ({"temperature": 2.0}, ValueError, "`temperature` belongs to kind='temperature'"),
        ({"start": 0.5, "stop": 0.2}, ValueError, "0 <= start <= stop <= 1 must hold"),
        ({"kind": "pag", "strength": 0.5}, ValueError, "use kind='soft_pag'"),
        ({"kind": "pag", "heads": {0: 0.5}}, ValueError, "use kind='soft_pag'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_values(options, error, message):
    with pytest.raises(error, match=message):
        HeadPerturbation(**{"heads": [(0, 0)], **options})


ANY_NUMBER = (
    st.sampled_from([2**31, 2**63, 2**70, -(2**70), 10**400, True, np.int64(1), np.float32(0.5)])
    | st.integers(-(2**70), 2**70)
    | st.floats()
)


@given(st.sampled_from(["strength", "scale", "sigma", "temperature", "start", "stop"]), ANY_NUMBER)
def test_any_number_is_taken_as_a_float_or_refused(name, value):
    kind = "temperature" if name == "temperature" else "soft_pag"
    try:
        perturbation = HeadPerturbation([(0, 0)], kind, **{name: value})
    except (ValueError, TypeError) as error:
        message = str(error)
        assert f"`{name}` must" in message or "start <= stop" in message
    else:
        assert type(getattr(perturbation, name)) is float
        assert getattr(perturbation, name) == float(value)


@given(ANY_NUMBER, st.booleans())
def test_any_head_is_taken_as_an_integer_or_refused(value, alone):
    try:
        perturbation = HeadPerturbation([value if alone else (0, value)])
    except ValueError as error:
        assert "must hold (layer, head) pairs or layers, as numbers from 0" in str(error)  # noqa: PT017
    else:
        (seen,) = perturbation.heads if alone else perturbation.heads[0][1:]
        assert type(seen) is int
        assert seen == value
        if value >= 4:
            with pytest.raises(ValueError, match=f"`heads` names {'layer' if alone else 'head'} {value}"):
                perturbation.layers(FLUX, 4)


class TestInRecipes:
    @pytest.mark.parametrize(
        "perturbation",
        [
            HeadPerturbation([(3, 1), (0, 2), 5]),
            HeadPerturbation({(3, 1): 0.5, 2: 0.25}, kind="seg", sigma=4.0, tokens="image"),
            HeadPerturbation([(0, 0)], kind="temperature", temperature=1e5, scale=5.0, start=0.1, stop=0.9),
            HeadPerturbation([(0, 0)], modules="both", strength=0.5),
        ],
        ids=lambda p: p.kind,
    )
    def test_round_trip(self, perturbation, tmp_path):
        recipe = Recipe({"all": Clear(3)}, guidance=perturbation)
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe
        recipe.save(tmp_path / "recipe.json")
        assert Recipe.load(tmp_path / "recipe.json") == recipe

    def test_tag_tells_guidance_apart(self):
        plain = Recipe(Dense())
        guided = [Recipe(Dense(), guidance=HeadPerturbation([(0, i)])) for i in (0, 1)]
        assert len({recipe.tag for recipe in (plain, *guided)}) == 3
        assert guided[0].tag.startswith("dense+soft-pag-")
        assert Recipe(Dense(), guidance=HeadPerturbation([(0, 0)], strength=abs)).tag  # has no plain form

    def test_schedules_have_no_plain_form(self):
        with pytest.raises(ValueError, match="cannot be written to a file; use a number"):
            Recipe(Dense(), guidance=HeadPerturbation([(0, 0)], strength=abs)).to_yaml()

    def test_bad_data(self):
        with pytest.raises(ValueError, match="unknown key 'head' of `guidance`"):
            HeadPerturbation.from_dict({"heads": [1], "head": 2})
        with pytest.raises(ValueError, match="a mapping with a list under `heads`"):
            HeadPerturbation.from_dict({"kind": "pag"})
        with pytest.raises(ValueError, match="a strength in every entry or in none"):
            HeadPerturbation.from_dict({"heads": [[0, 1, 0.5], 2]})
        with pytest.raises(TypeError, match="must be a `HeadPerturbation`"):
            Recipe(Dense(), guidance=object())
