"""FlexAttention without minutes of compilation, and a process in which Triton interprets."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from unittest import mock

import pytest
import torch


@pytest.fixture
def uncompiled_flex(monkeypatch):
    """The graphs of torch.compile, run as they are: seconds less for each mask and shape."""
    from torch._dynamo.utils import counters

    from dit_accel.kernels.block_sparse import flex

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    flex._compiled.cache_clear()
    torch.compiler.reset()
    counters.clear()
    yield
    flex._compiled.cache_clear()
    torch.compiler.reset()


@pytest.fixture(scope="session")
def _interpreting():
    """A process that had TRITON_INTERPRET from its start: Triton reads it as it defines a kernel."""
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(exec, "import dit_accel, torch; torch.set_num_threads(1)").result()
    with pool:
        yield pool


@pytest.fixture(scope="module")
def interpreter(_interpreting, request):
    """Calls a function of the test file, by name, in a process whose Triton interprets."""

    def call(function, *args):
        code = f"import runpy; runpy.run_path({request.module.__file__!r})[{function!r}](*{args!r})"
        return _interpreting.submit(exec, code).result()

    try:
        call("check", next(iter(request.module.CASES)))
    except Exception as error:
        if "only 0-dimensional arrays can be converted" in str(error):
            triton = pytest.importorskip("triton")
            pytest.skip(f"the interpreter of Triton {triton.__version__} needs numpy < 2.4")
    return call
