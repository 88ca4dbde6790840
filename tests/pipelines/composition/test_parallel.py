"""Several processes for one call, started once for all families."""

from __future__ import annotations

import re
from types import SimpleNamespace

import processes
import pytest
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ParallelConfig

from dit_accel import UnavailableError, enable
from dit_accel.pipelines import family_of

WITH_PLANS = ("flux", "sd3", "wan", "hunyuan", "hunyuan15", "qwen", "flux2", "zimage", "hunyuanimage")
WITH_PLANS += ("ltx", "ltx2", "cogvideox", "mochi", "chrono", "helios", "kandinsky5")
SHORT = {
    "skyreels": "its timesteps of frames are made inside",
    "far": "each process would need all keys of the cache",
    "animate": "its face adapter tells frames by place",
    "chroma": "its mask of text is of all tokens",
    "minimaxh3": "one packed sequence that need not divide",
}
CASE = "static, CFG, a dense step and layer"


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    asked = [f"{family}: {CASE}" for family in WITH_PLANS]
    return processes.run("context_parallel_cases", tmp_path_factory.mktemp("processes"), 2, *asked)


@pytest.mark.feature("Context parallelism (two processes, gloo)")
def test_context_parallelism(case, cell, request):
    if case.family in WITH_PLANS:
        for one in request.getfixturevalue("told"):
            assert one[f"{case.family}: {CASE}"].get("error", 1) < 1e-5
        return
    pipe, config = case.make(), ContextParallelConfig(ulysses_degree=2)
    config._ulysses_local_rank, config._ulysses_mesh = 0, SimpleNamespace(get_group=lambda: None)
    pipe.transformer._parallel_config = ParallelConfig(context_parallel_config=config)
    reason = re.escape(family_of(pipe.transformer).parallel_refusal)
    with cell.refused(UnavailableError, reason, SHORT[case.family]):
        enable(pipe, case.recipe)
