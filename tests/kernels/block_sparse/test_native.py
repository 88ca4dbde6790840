"""The compiled CPU kernel for every width of vector, and what happens where it cannot be compiled."""

from __future__ import annotations

import platform

import pytest
import torch
from attention_cases import VARIANTS, Case, check, check_gradients, check_tail

from dit_accel.errors import UnavailableError
from dit_accel.kernels import block_sizes, block_sparse_attention, can_run
from dit_accel.kernels.block_sparse import backends, cpp_library, native

X86 = platform.machine() in ("x86_64", "AMD64")
ASKED = {"device": "cpu", "dtype": torch.float32, "head_dim": 64, "block_size": (64, 16)}
CASES = [case for case in VARIANTS if case.block_size[1] % native.PANEL == 0]
WITH_GRADIENTS = [
    Case(600, dim=24, text=20, text_valid=(7,), density=0.01),
    Case(263, batch=2, dim=40, extra_keys=33, per_head=True, per_sample=True),
]
CASES += [Case(1027, batch=2), Case(1027, torch.bfloat16), Case(63, dim=100), Case(130, dim=1)]


@pytest.fixture
def fresh():
    """The library is looked for anew, and again afterwards."""
    native._library.cache_clear()
    yield
    native._library.cache_clear()


@pytest.mark.skipif(not X86, reason="switches off instructions of x86")
@pytest.mark.parametrize("flag", ["-mno-amx-bf16", "-mno-avx512f", "-mno-avx"])
@pytest.mark.usefixtures("fresh")
def test_every_width_of_vector(monkeypatch, flag):
    monkeypatch.setattr(cpp_library, "FLAGS", (*cpp_library.FLAGS, flag))
    assert can_run("native", **ASKED) is None
    assert not native._library()[0].has_tiles()
    for case in CASES:
        check(case, "native")
    check_tail(Case(300, dim=40, heads=3, per_head=True, text=40, text_valid=(5,)), "native")
    for case in WITH_GRADIENTS:
        for tail in (None, "pooled"):
            check_gradients(case.inputs(), case.mask(), case.valid(), "native", tail)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_the_result(threads):
    case = Case(300, batch=2, heads=3, per_head=True, text=20, text_valid=(20, 3))
    one = block_sparse_attention(*case.inputs(), case.mask(), text_valid=case.valid(), backend="native")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        again = block_sparse_attention(*case.inputs(), case.mask(), text_valid=case.valid(), backend="native")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(again, one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_not_a_number_stays_visible(dtype):
    """A NaN in a query makes its row NaN and no other; an infinite value reaches whoever attends to it."""
    case = Case(128, dtype, density=0.0)
    (q, k, v), allowed = case.inputs(), case.mask().to_token_mask()
    q[0, 0, 20, 3] = torch.nan
    v[0, 1, 30, 5] = torch.inf
    out = block_sparse_attention(q, k, v, case.mask(), backend="native")
    assert out[0, 0].isnan().any(-1).nonzero().flatten().tolist() == [20]
    assert allowed[:, 30].any()
    assert not out[0, 1, allowed[:, 30], 5].isfinite().any()


def test_matrix_products_of_other_libraries_still_work_afterwards():
    """Tiles of AMX are set differently there; both must find their own on every thread."""
    case = Case(300, torch.bfloat16, batch=2)
    x = torch.randn(500, 500, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = x @ x
    for _ in range(3):
        check(case, "native")
        assert torch.equal(x @ x, before)


@pytest.mark.usefixtures("fresh")
def test_without_a_compiler_gather_takes_over_and_says_why(monkeypatch, caplog, tmp_path):
    backends.log_choice.cache_clear()
    monkeypatch.setattr(cpp_library.shutil, "which", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "install g++ or clang++" in can_run("native", **ASKED)
    assert (128, 16) in block_sizes("cpu")
    case = Case(63)
    with pytest.raises(UnavailableError, match="'native' cannot run here: native compiles C"):
        block_sparse_attention(*case.inputs(), case.mask(), backend="native")
    for _ in range(2):
        block_sparse_attention(*case.inputs(), case.mask())
    (record,) = caplog.records  # at the level that Python shows by default
    assert "backend 'gather', which is slower than 'native': native compiles C++" in record.message


def test_what_it_cannot_do():
    assert "CPU only, got 'cuda'" in can_run("native", **{**ASKED, "device": "cuda"})
    assert "got torch.float64" in can_run("native", **{**ASKED, "dtype": torch.float64})
    assert "multiple of 16" in can_run("native", **{**ASKED, "block_size": (64, 8)})
    assert "have no gradient" in can_run("native", **ASKED, requires_grad=True, quantization="int8")
    assert "where it skips values" in can_run("native", **ASKED, requires_grad=True, pv_threshold=15.0)
