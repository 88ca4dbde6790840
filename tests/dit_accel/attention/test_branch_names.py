"""Names of guidance branches, as pipelines say them."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from dit_accel.attention.branch_names import BranchNames, branch_name


class Transformer:
    @contextmanager
    def cache_context(self, name: str):
        yield


@pytest.mark.parametrize(("said", "heard"), [("cond", "cond"), ("uncond", "uncond"), ("cond_uncond", None)])
def test_a_branch_is_one_of_them_alone(said, heard):
    """Pipelines that batch both in one call (LTX-Video, CogVideoX, Mochi) say so: it is no branch."""
    transformer = Transformer()
    names = BranchNames(transformer)
    names.attach()
    with transformer.cache_context(said):
        assert branch_name() == heard
    names.detach()
    with transformer.cache_context(said):
        assert branch_name() is None
