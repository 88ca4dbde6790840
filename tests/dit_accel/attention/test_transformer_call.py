"""Threads that use one enabled transformer at once, each with a pipeline and a scheduler of its own."""

from __future__ import annotations

import copy
import sys
import threading

import pytest
import torch

from dit_accel.errors import UnavailableError
from dit_accel.guidance import HeadPerturbation
from dit_accel.patterns import Clear, Neighborhood, Radial, Routed, SparseVideoGen
from dit_accel.pipelines import family_of
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, enable

FAMILIES = pytest.mark.parametrize("family", ["flux", "sd3", "wan", "hunyuan"])
GRIDS = {"flux": [(8, 12), (12, 6), (8, 12)], "wan": [(3, 6, 8), (4, 6, 6), (3, 6, 8)]}
GRIDS |= {"sd3": GRIDS["flux"], "hunyuan": GRIDS["wan"]}
ONLINE = SparseVideoGen(keep=0.5, block_size=16)
RECIPES = {
    "flux": Recipe(Clear(3), dense_steps={0, -1}),
    "sd3": Recipe({"all": Clear(4), "heads.1": Clear(2)}, order="hilbert", dense_steps=0.4),
    "wan": Recipe(ONLINE, dense_steps=1),
    "hunyuan": Recipe(
        {"double": SparseVideoGen(keep=0.5, block_size=16), "single": Neighborhood((3, 3, 3))},
        dense_steps={-1},
    ),
    "flux routed": Recipe(Routed(top_k=0.3, block_size=(16, 16), refresh=2), order="hilbert"),
    "wan static": Recipe(Radial(0.2, block_size=16), order="tile", dense_steps=2),
}


@pytest.fixture
def case(family, request):
    return request.getfixturevalue(family)


@pytest.fixture(autouse=True)
def _threads_take_turns_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval)


def around(pipe):
    """Another pipeline around the same transformer, with a scheduler of its own."""
    own = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
    own.set_progress_bar_config(disable=True)
    return own


class Run(threading.Thread):
    """A run of a pipeline in a thread; `result` is its latents, or the exception that ended it."""

    def __init__(self, case, pipe, **options):
        super().__init__(daemon=True)
        self._call = lambda: case.run(pipe, **options)
        self.result: torch.Tensor | Exception | None = None

    def run(self) -> None:
        try:
            self.result = self._call()
        except Exception as error:
            self.result = error

    def joined(self):
        self.join(300)
        assert not self.is_alive()
        return self.result


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    ("family", "recipe"), [(name.split()[0], recipe) for name, recipe in RECIPES.items()], ids=RECIPES
)
def test_runs_at_once(case, family, recipe, count):
    """Of different sizes and numbers of steps, text and seeds."""
    runs = [
        {"grid": GRIDS[family][i], "steps": (3, 5, 4)[i], "text_len": (7, 5, 9)[i], "seed": i}
        for i in range(count)
    ]
    handle = enable(case.pipe, recipe)
    expected = []
    for run in runs:
        expected.append((case.run(case.pipe, **run), handle.stats()))
    threads = [Run(case, around(case.pipe), **run) for run in runs]
    for thread in threads:
        thread.start()
    for thread, (latents, _) in zip(threads, expected, strict=True):
        assert torch.equal(thread.joined(), latents)
    assert handle.stats() in [stats for _, stats in expected]
    assert len(handle.stats()["grids"]) == 1


@FAMILIES
def test_an_enabled_and_an_untouched_transformer(case, family):
    other = case.make(seed=3)
    expected = case.run(other, steps=4)
    enable(case.pipe, RECIPES[family])
    sparse = case.run(case.pipe, steps=4)
    threads = [Run(case, pipe, steps=4) for pipe in (case.pipe, other)]
    for thread in threads:
        thread.start()
    assert torch.equal(threads[0].joined(), sparse)
    assert torch.equal(threads[1].joined(), expected)


@FAMILIES
def test_two_enabled_transformers(case, family):
    pipes, expected = [case.pipe, case.make(seed=3)], []
    for i, pipe in enumerate(pipes):
        enable(pipe, Recipe(RECIPES[family].attention, order=("hilbert", "raster")[i], dense_steps=i))
        expected.append(case.run(pipe))
    threads = [Run(case, pipe) for pipe in pipes]
    for thread in threads:
        thread.start()
    for thread, latents in zip(threads, expected, strict=True):
        assert torch.equal(thread.joined(), latents)


class Pause:
    """Holds the first thread that comes to a layer, until `go`."""

    def __init__(self, transformer):
        self.reached, self.go = threading.Event(), threading.Event()
        layer = list(family_of(transformer).layers(transformer).values())[1]
        self._hook = layer.register_forward_pre_hook(self._wait)

    def _wait(self, *_):
        if not self.reached.is_set():
            self.reached.set()
            assert self.go.wait(300)

    def remove(self):
        self._hook.remove()


@FAMILIES
def test_guidance_is_refused_in_a_second_thread(case, family):
    pattern = Clear(3) if family in ("flux", "sd3") else Neighborhood((3, 3, 3))
    heads = HeadPerturbation(heads=[(1, 0), (2, 1)], scale=2.0)
    with accelerated(case.pipe, Recipe(pattern, guidance=heads)):
        expected, pause = case.run(case.pipe), Pause(case.pipe.transformer)
        first = Run(case, around(case.pipe))
        first.start()
        assert pause.reached.wait(300)
        with pytest.raises(UnavailableError, match=rf"two threads at once: thread '{first.name}' is in a"):
            case.run(case.pipe, seed=5)
        pause.go.set()
        assert torch.equal(first.joined(), expected)
        pause.remove()
        second = Run(case, around(case.pipe))
        second.start()
        assert torch.equal(second.joined(), expected)
        assert torch.equal(case.run(case.pipe), expected)
