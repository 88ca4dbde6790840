"""Threads that stay: what they return and raise, in whose context, and that runs are in them."""

import contextvars
import threading

import pytest

pytest.importorskip("gradio", reason="needs dit-accel[demo]")
from dit_accel.demos import threads
from dit_accel.demos.threads import Threads


@pytest.fixture
def one():
    made = Threads(1, "one")
    yield made
    made.end()


def test_calls_share_a_thread_and_the_callers_context(one):
    event = contextvars.ContextVar("event", default="none")
    event.set("mine")
    first, second = (one.call(lambda: (event.get(), threading.get_ident())) for _ in range(2))
    assert first == second
    assert first[0] == "mine"
    assert first[1] != threading.get_ident()


def test_what_is_raised_reaches_the_caller(one):
    with pytest.raises(KeyError, match="lost"):
        one.call({}.__getitem__, "lost")


@pytest.mark.parametrize("missing", [AttributeError, OSError, TypeError])
def test_another_c_library_gives_nothing_back(monkeypatch, missing):
    def none(name):
        raise missing

    monkeypatch.setattr(threads.ctypes, "CDLL", none)
    threads._malloc_trim.cache_clear()
    try:
        threads.give_back_memory()
        assert threads._malloc_trim() is None
    finally:
        threads._malloc_trim.cache_clear()


def test_pictures_and_masks_are_made_in_threads_that_stay(client, demo, small, monkeypatch):
    from dit_accel.demos import mask_drawings
    from dit_accel.demos.worker import Worker

    seen, pipeline, estimates = set(), Worker.pipeline, mask_drawings.estimates_of

    def noted(function):
        def call(*args):
            seen.add(threading.current_thread().name)
            return function(*args)

        return call

    monkeypatch.setattr(Worker, "pipeline", noted(pipeline))
    monkeypatch.setattr(mask_drawings, "estimates_of", noted(estimates))
    client.predict(*small, api_name="/generate")
    client.predict("Clear", "radius: 5", 1, 8, 8, 0, "64x32", api_name="/mask")
    assert {name.rpartition("_")[0] for name in seen} == {"run", "draw"}
