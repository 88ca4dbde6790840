"""The registry: a backend that is added is one module and one entry, and everything else follows from it."""

from __future__ import annotations

import importlib.util
import logging
import re
from pathlib import Path

import pytest
import torch
from attention_cases import Case, check

from dit_accel import Recipe
from dit_accel.errors import UnavailableError
from dit_accel.kernels import (
    automatic_backend,
    block_sizes,
    block_sparse_attention,
    can_run,
    default_block_size,
    fastest_backend,
    support_table,
)
from dit_accel.kernels.block_sparse import backends
from dit_accel.patterns import Clear
from dit_accel.planning.plan import plan

EXAMPLE = Path(__file__).parents[3] / "docs" / "adding-a-backend.md"
ASKED = {"device": "cpu", "dtype": torch.float32, "head_dim": 64, "block_size": (64, 16)}


@pytest.fixture
def dense(tmp_path, monkeypatch):
    """The backend of docs/adding-a-backend.md, in a folder of its own, and its entry in the registry."""
    blocks = re.findall(r"```python\n(.*?)```", EXAMPLE.read_text(), flags=re.DOTALL)
    (code,) = (block for block in blocks if "BACKEND = " in block)
    (tmp_path / "dense.py").write_text(code)
    spec = importlib.util.spec_from_file_location("dense", tmp_path / "dense.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(backends, "BACKENDS", (module.BACKEND, *backends.BACKENDS))
    backends.log_choice.cache_clear()
    yield module
    backends.log_choice.cache_clear()


@pytest.mark.usefixtures("dense")
def test_an_added_backend_computes_what_all_do():
    for case in (Case(300, batch=2, text=40, text_valid=(17, 0)), Case(130, torch.bfloat16, per_head=True)):
        check(case, "dense", with_lse=False)


@pytest.mark.usefixtures("dense")
def test_what_can_run_and_why_not_follow_from_it():
    assert can_run("dense", **ASKED) is None
    assert can_run("dense", **ASKED, requires_grad=True) is None
    assert can_run("dense", **ASKED, return_lse=True) == "dense does not return lse"
    assert "dense supports bfloat16, float32, got torch.float16" in can_run(
        "dense", **{**ASKED, "dtype": torch.float16}
    )
    rows = [row for row in support_table() if row["backend"] == "dense" and row["device"] == "cpu"]
    status = {row["dtype"]: row["status"] for row in rows}
    assert status.pop("float16").startswith("dense supports")
    assert status == {"bfloat16": "yes", "float32": "yes"}
    with pytest.raises(
        ValueError, match=r"`backend` must be one of 'auto', 'dense', 'triton', .*, got 'dens'"
    ):
        can_run("dens", **ASKED)
    case = Case(63, torch.float16)
    with pytest.raises(UnavailableError, match="'dense' cannot run here: dense supports bfloat16"):
        block_sparse_attention(*case.inputs(), case.mask(), backend="dense")


@pytest.mark.usefixtures("dense")
def test_the_automatic_choice_and_its_block_sizes_follow_from_it(caplog):
    assert fastest_backend("cpu") == "dense"
    assert fastest_backend("cuda") == "triton"
    assert automatic_backend(**ASKED) == ("dense", None)
    assert automatic_backend(**ASKED, return_lse=True) == ("native", "dense does not return lse")
    assert block_sizes("cpu") == {(128, 32): 1.0}
    assert default_block_size("cpu") == (128, 32)
    case = Case(63)
    with caplog.at_level(logging.INFO, logger="dit_accel"):
        for return_lse in (False, True):
            block_sparse_attention(*case.inputs(), case.mask(), return_lse=return_lse)
    assert [record.message for record in caplog.records] == [
        "block_sparse_attention on cpu, torch.float32: backend 'dense'",
        "block_sparse_attention on cpu, torch.float32: backend 'native', which is slower than 'dense': "
        "dense does not return lse",
    ]


@pytest.mark.usefixtures("dense")
def test_a_format_is_what_a_backend_lists():
    case = Case(130)
    q, k, v = case.inputs()
    assert automatic_backend(**ASKED, quantization="fp8") == ("dense", None)
    assert can_run("native", **ASKED, quantization="fp8").startswith(
        "native does not compute quantization='fp8'"
    )
    rounded = [x.to(torch.float8_e4m3fn).float() for x in (q, k)]
    result = block_sparse_attention(q, k, v, case.mask(), quantization="fp8")
    assert torch.equal(result, block_sparse_attention(*rounded, v, case.mask()))
    assert not torch.equal(result, block_sparse_attention(q, k, v, case.mask()))
    with pytest.raises(UnavailableError, match="dense does not compute quantization='fp4', only 'fp8'"):
        block_sparse_attention(q, k, v, case.mask(), quantization="fp4")


@pytest.mark.usefixtures("dense")
def test_compiled_code_calls_it_as_one_operator():
    torch.compiler.reset()
    case = Case(130)
    inputs, mask = case.inputs(), case.mask()
    compiled = torch.compile(block_sparse_attention, fullgraph=True, backend="aot_eager")
    for options in ({"backend": "dense"}, {"quantization": "fp8"}):
        assert torch.equal(
            compiled(*inputs, mask, **options), block_sparse_attention(*inputs, mask, **options)
        )


@pytest.mark.usefixtures("dense")
def test_recipes_build_masks_for_it():
    assert plan(Recipe(Clear(4)), model="tiny-flux", size=(256, 256)).block_size == (128, 32)


def test_everything_but_a_module_and_its_entry_names_no_backend():
    """Of the modules that choose, only the registry's list has names in it."""
    names = {repr(backend.name).strip("'") for backend in backends.BACKENDS}
    folder = Path(backends.__file__).parent
    for path in (
        folder / "problem.py",
        folder / "backends.py",
        folder / "custom_op.py",
        folder / "validation.py",
    ):
        quoted = set(re.findall(r"[\"'](\w+)[\"']", path.read_text()))
        assert not quoted & names, f"{path.name} names {quoted & names}"
