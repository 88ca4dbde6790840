"""Recipes that nobody would write: as Python values, YAML and JSON, whole and damaged.

Whatever is given is a recipe, or a ValueError, TypeError or UnavailableError with a short message, soon.
"""

import dataclasses
import json
import math
import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dit_accel import patterns
from dit_accel.errors import UnavailableError
from dit_accel.recipe.recipe import Recipe

LONGEST_MESSAGE = 2_000
SOON = 20.0  # seconds of this process, of anything: what is made to do harm takes minutes or all memory
EXAMPLES = 10_000  # the same ones each time; `make fuzz` tries others
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
NAMES = [name for name in dir(patterns) if dataclasses.is_dataclass(getattr(patterns, name))]
FIELDS = [field.name for field in dataclasses.fields(Recipe)]
PATTERN_FIELDS = sorted({f.name for name in NAMES for f in dataclasses.fields(getattr(patterns, name))})
GUIDANCE_FIELDS = ["heads", "kind", "strength", "scale", "tokens", "sigma", "temperature", "modules", "start"]

numbers = st.one_of(
    st.integers(-3, 130),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63) - 1, 10**400]),
    st.floats(),
    st.floats(0, 1),
)
WORDS = ["all", "double.0-3", "-1", "heads.0", "auto", "hilbert", "soft_pag", "1e-3", "flux", "int8"]
words = st.one_of(st.sampled_from(WORDS), st.text(max_size=12))
scalars = st.one_of(st.none(), st.booleans(), numbers, words)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=3)),
    max_leaves=6,
)
triples = st.lists(st.integers(1, 9), min_size=1, max_size=3)
arguments = st.one_of(st.integers(1, 9), triples, st.booleans(), values)
pattern = st.one_of(
    st.sampled_from(NAMES),
    st.fixed_dictionaries(
        {"pattern": st.one_of(st.sampled_from(NAMES), words)},
        optional=dict.fromkeys(PATTERN_FIELDS, arguments),
    ),
    values,
)
heads = st.lists(st.lists(st.one_of(st.integers(0, 3), values), max_size=3), max_size=3)
guidance = st.fixed_dictionaries(
    {"heads": st.one_of(heads, values)}, optional=dict.fromkeys(GUIDANCE_FIELDS[1:], values)
)
recipes = st.fixed_dictionaries(
    {"attention": st.one_of(pattern, st.dictionaries(words, pattern, max_size=3))},
    optional={
        **{name: st.one_of(numbers, st.lists(numbers, max_size=3), values) for name in FIELDS[1:]},
        "guidance": st.one_of(guidance, values),
        "unknown": values,
    },
)
insertions = st.lists(
    st.tuples(st.integers(0, 10_000), st.sampled_from("{}[]&*!:,-?|>'\"\n\t0e.<\0")), max_size=4
)


def is_read_or_refused(read):
    """What `read` returns, or the documented error that it raises."""
    start = time.process_time()
    try:
        found = read()
    except (ValueError, TypeError, UnavailableError) as error:
        found = error
        assert len(str(error)) < LONGEST_MESSAGE, "the message is short"  # noqa: PT017
    assert time.process_time() - start < SOON
    return found


def check(data, draw, folder):
    found = is_read_or_refused(lambda: Recipe.from_dict(data, folder))
    if isinstance(found, Recipe):
        assert Recipe.from_yaml(found.to_yaml(), folder) == found
        assert found.tag
        repr(found)
        hash(found)
    is_read_or_refused(lambda: Recipe(**data))
    texts = [json.dumps(data), yaml.dump(data, Dumper=DUMPER, allow_unicode=draw(st.booleans()))]
    for text, suffix in zip(texts, (".json", ".yaml"), strict=True):
        is_read_or_refused(lambda text=text: Recipe.from_yaml(text, folder))
        damaged = list(text)
        for place, character in draw(insertions):
            damaged.insert(place % (len(damaged) + 1), character)
        is_read_or_refused(lambda damaged=damaged: Recipe.from_yaml("".join(damaged), folder))
        path = folder / f"recipe{suffix}"
        path.unlink(missing_ok=True)  # to write over a file that has content takes ext4 20 times longer
        path.write_text("".join(damaged), encoding="utf-8", errors="surrogatepass")
        refused = is_read_or_refused(lambda path=path: Recipe.load(path))
        assert (
            isinstance(refused, Recipe) or str(path) in str(refused) or isinstance(refused, UnavailableError)
        )


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipes, st.data())
def test_a_recipe_or_an_error(tmp_path_factory, data, more):
    check(data, more.draw, tmp_path_factory.getbasetemp())


# -- made to do harm -----------------------------------------------------------------------------------------


def aliases(levels, width):
    lines = ["a0: &a0 [x, x]"]
    for n in range(1, levels):
        lines.append(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]")
    return "\n".join([*lines, f"attention: {{pattern: Clear, radius: *a{levels - 1}}}"])


BOMBS = {
    "aliases": (aliases(9, 9), "anchor or alias"),
    "aliases-in-lists": ("attention: {pattern: Clear, radius: &a [*a]}", "anchor or alias"),
    "an-anchor-alone": ("attention: &a {pattern: Clear, radius: 3}", "anchor or alias"),
    "a-recursive-mapping": ("&a {attention: *a}", "anchor or alias"),
    "merges": ("attention: {<<: {pattern: Clear}, radius: 3}", "merges mappings"),
    "depth-of-lists": ("attention: " + "[" * 40_000, "nested more than 12 deep"),
    "depth-of-mappings": ("{a: " * 20_000, "nested more than 12 deep"),
    "depth-of-blocks": ("\n".join(" " * n + "a:" for n in range(300)), "nested more than 12 deep"),
    "depth-of-complex-keys": ("? " * 40_000, "nested more than 12 deep"),
    "depth-of-json": ('{"attention": ' * 7_000, "nested more than 12 deep"),
    "depth-of-json-that-ends": ("[" * 9_000 + "]" * 9_000, "nested more than 12 deep"),
    "length": ("source: " + "a" * 500_000, "at most 400000 characters"),
    "many-values": (f"attention: {{pattern: Clear, radius: [{'1,' * 19_900}]}}", "`radius` must be"),
    "too-many-values": (f"[{'[],' * 80_000}]", "more than 20000 values"),
    "tag": ("attention: !!python/object/apply:os.system [id]", "has a tag"),
    "tag-of-a-number": ("attention: Dense\ndense_layers: !!int ''", "has a tag"),
    "date": ("attention: Dense\nname: 2020-01-01", "text, numbers, lists and mappings"),
    "no-date": ("attention: Dense\nname: 2020-13-45", "must be YAML or JSON"),
    "digits": ("attention: Dense\ndense_layers: " + "9" * 50_000, "must be YAML or JSON"),
    "hexadecimal": ("attention: Dense\ndense_layers: 0x" + "f" * 50_000, "more than 64 bits"),
    "sexagesimal": ("attention: Dense\ndense_layers: 1" + ":59" * 20_000, "more than 64 bits"),
    "sexagesimal-float": ("attention: Dense\ndense_steps: 1" + ":59" * 20_000 + ".5", "must be YAML or JSON"),
    "nan": ("attention: Dense\ndense_steps: .nan", "must be finite, got nan"),
    "infinity": ("attention: {pattern: Clear, radius: -.inf}", "must be finite, got -inf"),
    "infinity-by-size": ("attention: {pattern: Clear, radius: 1e999}", "must be finite, got inf"),
    "duplicate": ("attention: Dense\nname: a\nname: b", "the key 'name' is there twice"),
    "duplicate-in-a-pattern": (
        "attention: {pattern: Clear, radius: 3, radius: 4}",
        "'radius' is there twice",
    ),
    "duplicate-selector": ("attention: {1: Dense, 0x1: Dense}", "is there twice"),
    "duplicate-in-json": ('{"attention": "Dense", "name": "a", "name": "b"}', "'name' is there twice"),
    "unhashable-key": ("attention: {[1]: Dense}", "must be YAML or JSON"),
    "key-that-is-no-text": ("attention: {1.5: Dense}", "keys of a recipe must be text, got 1.5"),
    "two-documents": ("attention: Dense\n---\nattention: Dense", "must be YAML or JSON"),
    "control-characters": ("attention: Dense\nname: \x07", "must be YAML or JSON"),
    "nothing": ("", "must be a mapping with the key `attention`"),
}


@pytest.mark.parametrize(("text", "reason"), BOMBS.values(), ids=BOMBS)
def test_what_is_made_to_do_harm_is_refused_soon(text, reason, tmp_path):
    for read in (lambda: Recipe.from_yaml(text), lambda: Recipe.load(tmp_path / "a.yaml")):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises((ValueError, TypeError), match=reason) as error:
            raise is_read_or_refused(read)
        assert len(str(error.value)) < 800
    assert "a.yaml" in str(error.value)


NAN = {"attention": {"pattern": "Clear", "radius": math.nan}}
JSON_BOMBS = {
    "nan": (json.dumps(NAN), "NaN is no number of JSON"),
    "infinity": ('{"attention": "Dense", "dense_steps": Infinity}', "Infinity is no number of JSON"),
    "overflow": ('{"attention": "Dense", "dense_steps": 1e999}', "must be finite, got inf"),
    "depth": ("[" * 90_000, "nested too deeply"),
    "depth-that-ends": ("[" * 500 + "]" * 500, "nested more than 12 deep"),
    "digits": (f'{{"attention": "Dense", "dense_layers": {"9" * 50_000}}}', "4300 digits"),
    "big": ('{"attention": "Dense", "dense_layers": 99999999999999999999}', "more than 64 bits"),
    "duplicate": ('{"attention": "Dense", "attention": "Dense"}', "the key 'attention' is there twice"),
    "yaml": ("attention: Dense", "Expecting value"),
    "nothing": ("", "Expecting value"),
}


@pytest.mark.parametrize(("text", "reason"), JSON_BOMBS.values(), ids=JSON_BOMBS)
@pytest.mark.parametrize("place", ["recipe", "guidance"])
def test_json_files_are_as_strict(text, reason, place, tmp_path):
    (tmp_path / "a.json").write_text(text)
    path = tmp_path / ("a.json" if place == "recipe" else "b.yaml")
    (tmp_path / "b.yaml").write_text("attention: Dense\nguidance: a.json")
    with pytest.raises((ValueError, TypeError), match=reason) as error:
        raise is_read_or_refused(lambda: Recipe.load(path))
    assert "a.json" in str(error.value)


def knot():
    """A list that is in itself."""
    found = []
    found.append(found)
    return found


def doubling():
    """Lists of 2^60 entries, as aliases make them."""
    found = [1]
    for _ in range(60):
        found = [found, found]
    return found


@pytest.mark.parametrize("make", [knot, doubling, lambda: {"a": knot()}, lambda: [[1] * 60_000]])
@pytest.mark.parametrize("field", FIELDS)
def test_values_without_end(make, field):
    data = {"attention": "Dense", field: make()}
    assert isinstance(is_read_or_refused(lambda: Recipe.from_dict(data)), Exception)
    whole = {"attention": patterns.Dense(), field: make()}
    assert isinstance(is_read_or_refused(lambda: Recipe(**whole)), Exception)
    nested = {"attention": {"pattern": "Clear", "radius": make()}}
    assert isinstance(is_read_or_refused(lambda: Recipe.from_dict(nested)), Exception)


def test_indices_without_end():
    def count():
        n = 0
        while True:
            yield n
            n += 1

    for spec in (count(), range(10**15)):
        with pytest.raises(ValueError, match="`dense_layers` has more than 100000 indices"):
            Recipe(patterns.Dense(), dense_layers=spec)


# -- types where they enter ----------------------------------------------------------------------------------

WRONG = {
    "family": [3, True, ["flux"], {"a": 1}, 1.5],
    "quantization": [3, True, ["int8"], {"a": 1}, "int9", {}, {"all": "pooled"}],
    "backend": [None, 3, ["gather"], {"a": 1}],
    "order": [None, 3, ["auto"], {"a": 1}, "spiral"],
    "name": [None, 3, ["a"]],
    "source": [None, 3, ["a"]],
    "min_tokens": ["many", -1, 1.5, True, [1], None, "3"],
    "block_size": ["auto", 64, [64], [64, 32, 1], [True, True], [64.0, 32.0], ["64", "32"], [0, 0]],
    "dense_layers": ["all", "3", True, 1.5, [0.5], ["1"], {"0": 1}, [True], None],
    "dense_steps": ["all", "0.3", False, 1.5, [0.5], [None], {"0": 1}, None],
    "guidance": [3, True, ["a"], {"a": 1}],
    "adapter": [3, True, ["a"], {"a": 1}, "none"],
    "tail": [True, 3, "yes", ["pooled"], {}, {"all": 3}],
    "guard": [None, 0, 1, "yes", [True]],
    "attention": [3, None, True, [], {}, {"all": 3}, {"all": None}, "dense"],
}
CASES = [(field, value) for field, wrong in WRONG.items() for value in wrong]


@pytest.mark.parametrize(("field", "value"), CASES, ids=[f"{field}-{value}" for field, value in CASES])
def test_the_type_of_every_field_is_checked(field, value):
    fine = {"attention": {"pattern": "Dense"}}
    for read in (
        lambda: Recipe(**{"attention": patterns.Dense(), field: value}),
        lambda: Recipe.from_dict({**fine, field: value}),
        lambda: Recipe.from_yaml(yaml.safe_dump({**fine, field: value})),
        lambda: Recipe.from_yaml(json.dumps({**fine, field: value})),
    ):
        with pytest.raises((ValueError, TypeError), match=r"`(\w+)`|pattern"):
            read()


def test_every_field_is_tried():
    assert set(WRONG) == set(FIELDS)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{pattern: Radial, exact: 1}", "`exact` must be True or False, got 1"),
        ("{pattern: Radial, exact: 'yes'}", "`exact` must be True or False, got 'yes'"),
        ("{pattern: Radial, decay_factor: '0.2'}", "`decay_factor` must be a positive number, got '0.2'"),
        ("{pattern: Neighborhood, window: ['3', 3]}", "`window` must be"),
        ("{pattern: Neighborhood, window: [3, 3], is_causal: 0}", "`is_causal` must be"),
        ("{pattern: SparseVideoGen, inclusive: [true]}", "`inclusive` must be True or False"),
    ],
)
def test_types_of_patterns_are_checked(pattern, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_yaml(f"attention: {pattern}")


def test_numbers_of_json_are_numbers_in_yaml():
    """YAML 1.1 takes 1e-3 for text."""
    for text in ("1e-3", "1.0e-3", "1E-3", ".1e-2"):
        recipe = Recipe.from_yaml(f"attention: {{pattern: Radial, decay_factor: {text}}}")
        assert recipe.attention.decay_factor == 0.001
    recipe = Recipe({"1e-3": patterns.Radial(decay_factor=1e-7)}, name="1e3", source="5E-1")
    assert Recipe.from_yaml(json.dumps(recipe.to_dict())) == Recipe.from_yaml(recipe.to_yaml()) == recipe
