"""FlexAttention without minutes of compilation."""

from functools import partial

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
