"""The composition matrix: what each (feature, family) cell is, from the outcome of its test.

A test marked `feature("name", families)` runs once per family, and each run is one cell of the matrix in
pipelines/COMPOSITION.md: "works", or what the test says of itself through the fixture `cell`. A run that
ends otherwise than the committed matrix says fails. `--composition-table PATH` writes the matrix instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.patterns import Clear, Neighborhood
from dit_accel.pipelines import family_of
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated

TABLE = Path(__file__).parents[3] / "pipelines" / "COMPOSITION.md"
TITLES = {
    "flux": "FLUX", "sd3": "SD3", "wan": "Wan", "hunyuan": "HunyuanVideo", "hunyuan15": "HunyuanVideo 1.5",
    "skyreels": "SkyReels-V2", "qwen": "Qwen-Image", "zimage": "Z-Image", "flux2": "FLUX.2",
    "hunyuanimage": "HunyuanImage", "chroma": "Chroma", "ltx": "LTX-Video", "cogvideox": "CogVideoX",
    "mochi": "Mochi", "ltx2": "LTX-2", "animate": "Wan Animate",
    "chrono": "ChronoEdit", "helios": "Helios", "minimaxh3": "MiniMax H3", "kandinsky5": "Kandinsky 5",
    "far": "AnyFlow-FAR",
}  # fmt: skip
IMAGES = ("chroma", "hunyuanimage", "zimage", "flux", "flux2", "sd3", "qwen")
TEXT_FIRST = ("flux", "flux2", "chroma", "qwen", "cogvideox", "minimaxh3")
NO_TEXT = ("wan", "skyreels", "ltx", "ltx2", "animate", "chrono", "helios", "kandinsky5", "far")
WORKS, NONE, NEEDS_GPU = "works", "–", "needs a GPU"
OUTCOMES = pytest.StashKey[dict]()
COLLECTED = pytest.StashKey[list]()

HEAD = """# What composes with accelerated attention

Each cell is one test on a tiny random transformer of the family, in `tests/pipelines/composition`, which
fails when the cell is not true:

- **works**: the output is that of the same transformer with the same feature under a dense mask, and after
  `disable` it is that of one which was never enabled, bit for bit;
- **refused**: an error before any work, which names feature, reason and remedy;
- **needs a GPU**: the test runs where there is one, which this machine was not;
- –: the family has no such thing.

Written by `python -m pytest tests/pipelines/composition --composition-table pipelines/COMPOSITION.md`.
"""


def pytest_addoption(parser):
    parser.addoption("--composition-table", metavar="PATH", help="write the composition matrix to PATH")


def pytest_configure(config):
    config.addinivalue_line("markers", "feature(name, families): a row of the composition matrix")
    config.stash[OUTCOMES] = {}


def pytest_generate_tests(metafunc):
    marker = metafunc.definition.get_closest_marker("feature")
    if marker is not None:
        metafunc.parametrize("family", marker.kwargs.get("families", tuple(TITLES)))


@pytest.hookimpl(tryfirst=True)  # before -k and -m leave tests out
def pytest_collection_modifyitems(config, items):
    config.stash[COLLECTED] = [(item.path, key_of(item)) for item in items]


def key_of(item) -> tuple[str, str] | None:
    """The (feature, family) of a test, or None."""
    marker = item.get_closest_marker("feature")
    return None if marker is None else (marker.args[0], item.callspec.params["family"])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    key = key_of(item)
    if key is None:
        return (yield)
    outcomes = item.config.stash[OUTCOMES]
    try:
        result = yield
    except pytest.skip.Exception as skip:
        outcomes[key] = skip.msg
        raise
    outcomes[key] = item.funcargs["cell"].outcome
    if item.config.getoption("--composition-table", default=None) is None:
        said = read_table().get(key)
        assert said in (outcomes[key], NEEDS_GPU), (
            f"{TABLE.name} says {said!r} of {key}, not {outcomes[key]!r}"
        )
    return result


def read_table() -> dict[tuple[str, str], str]:
    """The cells of the committed matrix that are not empty."""
    rows = [line.strip("|").split("|") for line in TABLE.read_text().splitlines() if line.startswith("|")]
    cells = {}
    for name, *outcomes in rows[2:]:
        cells |= {(name.strip(), f): o.strip() for f, o in zip(TITLES, outcomes, strict=True)}
    return {key: outcome for key, outcome in cells.items() if outcome != NONE}


def pytest_sessionfinish(session):
    path = session.config.getoption("--composition-table", default=None)
    if path is not None:
        Path(path).write_text(table_of(session.config.stash[OUTCOMES]))


def table_of(outcomes: dict[tuple[str, str], str]) -> str:
    rows = [["feature", *TITLES.values()], ["---"] * (1 + len(TITLES))]
    for name in dict.fromkeys(name for name, _ in outcomes):
        rows.append([name, *(outcomes.get((name, family), NONE) for family in TITLES)])
    return HEAD + "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


class Cell:
    """What a test says of its cell; "works" unless it says otherwise."""

    outcome = WORKS

    @contextmanager
    def refused(self, error: type[Exception], match: str, short: str) -> Iterator[None]:
        """The block raises that error, with a message that names feature, reason and remedy."""
        with pytest.raises(error, match=match):
            yield
        self.outcome = f"refused: {short}"

    def no_such_thing(self, why: str) -> None:
        self.outcome = f"{NONE} ({why})"


@pytest.fixture
def cell() -> Cell:
    return Cell()


@pytest.fixture(autouse=True)
def _every_test_has_a_cell(cell):
    pass


class Case:
    """One family: its tiny pipeline, a recipe that permutes its tokens, and the same under dense masks."""

    def __init__(self, family: str, tools: SimpleNamespace, masked: Callable):
        image = family in IMAGES
        self.family, self.run, self.pipe_inputs, self._masked = family, tools.run, tools.inputs, masked
        self._make = tools.make
        self.pattern = Clear(3) if image else Neighborhood((3, 3, 3))
        self.recipe = Recipe(self.pattern, order="hilbert")
        self.grid = (1, 8, 12) if image else (3, 6, 8)
        text_len = 0 if family in NO_TEXT else 32 if family == "zimage" else 7  # filled up
        self.layout = TokenLayout(self.grid, text_len, text_first=family in TEXT_FIRST)
        # Kandinsky 5 rounds queries and keys to bf16 in every dtype, where fp32's last bit may decide
        self.tolerance = (1e-3, 1e-3) if family == "kandinsky5" else (1e-4, 1e-5)
        self.config = {"dual_attention_layers": (0, 2), "qk_norm": "rms_norm"} if family == "sd3" else {}

    def make(self, **config):
        """A new pipeline, always of the same weights."""
        return self._make(**{**self.config, **config})

    def layers(self, transformer) -> dict[str, torch.nn.Module]:
        return family_of(transformer).layers(transformer)

    def mask(self, transformer, layout: TokenLayout | None = None) -> None:
        """Put the pattern's dense mask under every layer."""
        family, modules = family_of(transformer), self.layers(transformer)
        layouts = {name: family.layer_layout(name, layout or self.layout) for name in modules}
        self._masked(modules, {name: self.pattern.token_mask(own) for name, own in layouts.items()})

    def masked(self, feature: Callable = lambda pipe: None, layout=None, **config):
        """A pipeline with the feature, under dense masks."""
        pipe = self.make(**config)
        feature(pipe)
        self.mask(pipe.transformer, layout)
        return pipe

    def untouched(self, feature: Callable = lambda pipe: None, **config):
        """A pipeline with the feature that is never enabled."""
        pipe = self.make(**config)
        feature(pipe)
        return pipe

    def inputs(self, pipe=None) -> dict:
        """What a pipeline passes to its transformer."""
        return self.pipe_inputs(pipe or self.make())

    def close(self, actual: torch.Tensor, expected: torch.Tensor) -> None:
        rtol, atol = self.tolerance
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)

    def works(self, feature: Callable, enabled_first: bool = False, recipe=None, config=None, **run) -> None:
        """The feature under a dense mask, and after `disable` as if never enabled."""
        config, run = config or {}, {"steps": 2, **run}
        expected = self.run(self.masked(feature, **config), **run)
        untouched = self.run(self.untouched(feature, **config), **run)
        assert not torch.allclose(expected, untouched, atol=1e-3)
        pipe = self.make(**config)
        if not enabled_first:
            feature(pipe)
        with accelerated(pipe, recipe or self.recipe):
            if enabled_first:
                feature(pipe)
            self.close(self.run(pipe, **run), expected)
        assert torch.equal(self.run(pipe, **run), untouched)


@pytest.fixture
def case(family, request, masked) -> Case:
    return Case(family, request.getfixturevalue(family), masked)
