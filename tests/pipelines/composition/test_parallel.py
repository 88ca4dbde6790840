"""Several processes for one call, started once for all families."""

from __future__ import annotations

from types import SimpleNamespace

import processes
import pytest
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ParallelConfig

from dit_accel import UnavailableError, enable

WITH_PLANS = ("flux", "sd3", "wan", "hunyuan", "hunyuan15", "qwen", "flux2", "zimage", "hunyuanimage")
WITH_PLANS += ("ltx", "cogvideox", "mochi")
CASE = "static, CFG, a dense step and layer"


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    asked = [f"{family}: {CASE}" for family in WITH_PLANS]
    return processes.run("context_parallel_cases", tmp_path_factory.mktemp("processes"), 2, *asked)


@pytest.mark.feature("Context parallelism (two processes, gloo)")
def test_context_parallelism(case, cell, told):
    if case.family in WITH_PLANS:
        for one in told:
            assert one[f"{case.family}: {CASE}"].get("error", 1) < 1e-5
        return
    pipe, config = case.make(), ContextParallelConfig(ulysses_degree=2)
    config._ulysses_local_rank, config._ulysses_mesh = 0, SimpleNamespace(get_group=lambda: None)
    pipe.transformer._parallel_config = ParallelConfig(context_parallel_config=config)
    with cell.refused(UnavailableError, "its timesteps of frames", "its timesteps of frames are made inside"):
        enable(pipe, case.recipe)
