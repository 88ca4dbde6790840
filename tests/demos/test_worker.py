"""The shared pipeline: one run at a time, exchanged on a switch, gone when memory runs out."""

import gc
import subprocess
import sys
import threading
import weakref

import pytest
import torch

from dit_accel.demos.settings import Settings
from dit_accel.demos.worker import NoMemory, Worker


@pytest.fixture
def worker():
    return Worker(Settings(torch.device("cpu"), torch.float32, models=("tiny-flux", "tiny-wan")))


def test_a_switch_unloads_the_model_before(worker):
    with worker.pipeline("tiny-flux") as pipe:
        before = weakref.ref(pipe.transformer)
    with worker.pipeline("tiny-flux") as again:
        assert again is pipe
    del pipe, again
    with worker.pipeline("tiny-wan") as other:
        gc.collect()
        assert before() is None
        assert type(other).__name__ == "WanPipeline"
    assert worker.loaded == "tiny-wan"


IMPORTING = """
import threading, torch
from dit_accel.demos import heads
from dit_accel.demos.settings import Settings
from dit_accel.demos.worker import Worker

worker, failed = Worker(Settings(torch.device("cpu"), torch.float32)), []

def load():
    with worker.pipeline("tiny-sd3"):
        pass

def tried(function):
    try:
        function()
    except Exception as error:
        failed.append(error)

looks = [load, *(lambda name=name: heads._layers(name) for name in ("tiny-flux", "tiny-wan"))]
threads = [threading.Thread(target=tried, args=(look,)) for look in looks]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failed, failed
"""


def test_tabs_that_open_at_once_in_a_new_process_import_one_after_the_other():
    subprocess.run([sys.executable, "-c", IMPORTING], check=True)


def test_other_models_are_not_loaded(worker):
    with pytest.raises(ValueError, match="tiny-flux, tiny-wan"), worker.pipeline("tiny-sd3"):
        pass
    assert worker.loaded is None


def test_one_run_at_a_time(worker, monkeypatch):
    monkeypatch.setattr(worker, "_load", lambda model: setattr(worker, "loaded", model))
    inside, most = [], []

    def use():
        for _ in range(20):
            with worker.pipeline("tiny-flux"):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1


def test_what_must_not_meet_a_run_knows_of_it(worker, monkeypatch):
    monkeypatch.setattr(worker, "_load", lambda model: setattr(worker, "loaded", model))
    with worker.unless_busy() as free:
        assert free
    with worker.pipeline("tiny-flux"), worker.unless_busy() as free:
        assert not free
    with worker.unless_busy() as free:
        assert free


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
        ),
    ],
    ids=["cuda", "host", "torch-on-the-cpu"],
)
def test_out_of_memory_is_a_message_and_unloads(worker, monkeypatch, error):
    monkeypatch.setattr(worker, "_load", lambda model: setattr(worker, "loaded", model))
    with pytest.raises(NoMemory, match="smaller size"), worker.pipeline("tiny-flux"):
        raise error
    assert worker.loaded is None


def test_other_errors_keep_the_model(worker, monkeypatch):
    monkeypatch.setattr(worker, "_load", lambda model: setattr(worker, "loaded", model))
    with pytest.raises(ValueError, match="steps"), worker.pipeline("tiny-flux"):
        raise ValueError("steps")
    assert worker.loaded == "tiny-flux"
