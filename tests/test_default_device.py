"""Users may set PyTorch's default device and dtype: nothing here follows them."""

import ast
import dataclasses
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from pattern_cases import FORMS

from dit_accel import Recipe, TokenLayout, disable, enable
from dit_accel.guidance import HeadPerturbation
from dit_accel.masks import orders
from dit_accel.patterns import (
    Clear,
    Neighborhood,
    Radial,
    SparseVideoGen,
    SpatialHead,
)
from dit_accel.patterns.radial import radial_cells
from dit_accel.training_loop import Draw

ROOT = Path(__file__).parents[1]
FOLDERS = [
    *(
        f"dit_accel/{room}"
        for room in ("attention", "distillation", "guidance", "masks", "patterns", "runtime")
    ),
    "kernels",
    "pipelines/families",
]
OF_NUMBERS = {
    "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "tensor", "zeros",
}  # fmt: skip
OF_INTEGERS = {"arange", "randint", "randperm", "tril_indices", "triu_indices"}  # of int64 by themselves
OF_OTHERS = {"Generator", "as_tensor", "asarray", "scalar_tensor"}


def creations(source: str) -> list[ast.Call]:
    """Calls in a module that make a tensor or a generator out of nothing."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        call
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and getattr(call.func.value, "id", None) == "torch"
        and call.func.attr in OF_NUMBERS | OF_INTEGERS | OF_OTHERS
    ]


def unnamed(source: str) -> list[str]:
    """What is wrong with which of them."""
    found = []
    for call in creations(source):
        named, kind = {keyword.arg for keyword in call.keywords}, call.func.attr
        if "device" not in named and not (kind == "Generator" and call.args):
            found.append(f"line {call.lineno}: torch.{kind} names no device")
        if kind in OF_NUMBERS and "dtype" not in named:
            found.append(f"line {call.lineno}: torch.{kind} names no dtype")
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_tensors_are_made_on_a_named_device_in_a_named_dtype(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert any(creations(file.read_text()) for file in files)
    assert not [f"{file.relative_to(ROOT)} {text}" for file in files for text in unnamed(file.read_text())]


def test_draws_of_training_follow_no_default():
    expected = [Draw(1).normal((3,)), Draw(1).uniform((3,))]
    for scope in DEFAULTS.values():
        with scope():
            assert [x.tolist() for x in (Draw(1).normal((3,)), Draw(1).uniform((3,)))] == [
                x.tolist() for x in expected
            ]


def test_what_the_walk_finds():
    assert unnamed("torch.arange(3)\ntorch.zeros(3, device='cpu')\ntorch.Generator('cpu')") == [
        "line 1: torch.arange names no device",
        "line 2: torch.zeros names no dtype",
    ]


@contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS = {
    "set_default_device": default_device,
    "with-device": lambda: torch.device("meta"),
    "set_default_dtype": default_dtype,
}


def tensors(mask) -> dict[str, torch.Tensor]:
    values = {f.name: getattr(mask, f.name) for f in dataclasses.fields(mask)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def new_layout(**options) -> TokenLayout:
    """Nothing of it is cached."""
    radial_cells.cache_clear()
    orders.hilbert.cache_clear()
    orders.inside_tile.cache_clear()
    return TokenLayout((3, 8, 8), 5, **options)


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("order", ["auto", "tile", "hilbert", "raster"])
@pytest.mark.parametrize("pattern", FORMS.values(), ids=FORMS)
def test_masks(pattern, order, default):
    built = {}
    for name, scope in (("before", torch.no_grad), ("under", DEFAULTS[default])):
        with scope():
            mask = pattern.block_mask(new_layout(anchor=(1, 2, 2)), (16, 16), order)
            built[name] = {
                **tensors(mask),
                "token_mask": pattern.token_mask(new_layout()),
                "to_token_mask": mask.to_token_mask(),
            }
            densities = (pattern.density(new_layout()), mask.density, mask.block_density)
            built[name]["densities"] = torch.tensor(densities, dtype=torch.float64, device="cpu")
    assert built["before"].keys() == built["under"].keys()
    for name, x in built["under"].items():
        assert x.device.type == "cpu"
        assert x.dtype == built["before"][name].dtype
        assert torch.equal(x, built["before"][name]), name


RECIPES = {
    "flux": Clear(3),
    "sd3": Neighborhood((3, 5)),
    "wan": SparseVideoGen(0.5, block_size=8),
    "hunyuan": {"all": Radial(0.2, block_size=16), "heads.1": SpatialHead(0.5, block_size=8)},
}
PERTURBED = {
    kind: HeadPerturbation([(0, 1), 1], kind, temperature=2.0 if kind == "temperature" else None)
    for kind in ("soft_pag", "uniform", "seg", "temperature")
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("family", RECIPES)
class TestEnabled:
    def test_under_it(self, families, family, default):
        """Then run as always."""
        make, run = families[family].make, families[family].run
        recipe = Recipe(RECIPES[family], order="hilbert", block_size=(16, 16))
        pipe = make()
        stock = run(pipe)
        enable(pipe, recipe)
        expected = run(pipe)
        disable(pipe)
        with DEFAULTS[default]():
            enable(pipe, recipe)
        assert torch.equal(run(pipe), expected)
        assert not torch.equal(expected, stock)

    @pytest.mark.parametrize("guidance", [None, *PERTURBED])
    def test_and_called_under_it(self, families, family, default, guidance):
        """The transformer, as far as diffusers itself does not follow the defaults."""
        pipe = families[family].make()
        inputs = {**families[family].inputs(pipe), "return_dict": False}
        recipe = Recipe(
            RECIPES[family], order="hilbert", block_size=(16, 16), guidance=PERTURBED.get(guidance)
        )

        @torch.no_grad()
        def call(scope=torch.no_grad) -> torch.Tensor:
            new_layout()
            with scope():
                handle = enable(pipe, recipe)
                handle.begin(1)
                return pipe.transformer(**inputs)[0]

        with torch.no_grad(), DEFAULTS[default]():
            try:
                alike = torch.equal(pipe.transformer(**inputs)[0], pipe.transformer(**inputs)[0])
            except (RuntimeError, NotImplementedError) as error:
                pytest.skip(f"diffusers itself: {error}")
        assert alike
        assert torch.equal(call(DEFAULTS[default]), call())
