"""The one pipeline that is loaded: one run uses it at a time, and another model takes its place."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .settings import Settings
from .threads import give_back_memory

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# diffusers and transformers import their parts as these are used: a second thread finds them half made
IMPORTS = threading.RLock()
OUT_OF_MEMORY = "Not enough memory for this. Take a smaller size or fewer frames; the model was unloaded."


class NoMemory(Exception):
    """Memory ran out, on the device or the host; the pipeline was unloaded."""


class Worker:
    """See the module docstring."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.loaded: str | None = None
        self._pipe: Any = None  # a pipeline, while one is loaded
        self._lock = threading.Lock()

    @contextmanager
    def pipeline(self, model: str) -> Iterator[DiffusionPipeline]:
        """The pipeline of a model of the settings, for the length of a `with` block, for nobody else.

        Raises:
            ValueError: a model that was not named at the start.
            NoMemory: loading it, or what is done with it, ran out of memory.
        """
        if model not in self.settings.models:
            raise ValueError(f"this demo has the models {', '.join(self.settings.models)}")
        with self._lock:
            try:
                if self.loaded != model:
                    self._unload()
                    self._load(model)
                yield self._pipe
            except Exception as error:
                if not _is_out_of_memory(error):
                    raise
                self._unload()
                raise NoMemory(OUT_OF_MEMORY) from None
            finally:
                give_back_memory()

    @contextmanager
    def unless_busy(self) -> Iterator[bool]:
        """Whether no run is under way; if so none begins within the `with` block, which should be short."""
        free = self._lock.acquire(blocking=False)
        try:
            yield free
        finally:
            if free:
                self._lock.release()

    def _load(self, model: str) -> None:
        from dit_accel.generation import load

        with IMPORTS:
            self._pipe = load(model, self.settings.dtype, self.settings.device)
        self.loaded = model

    def _unload(self) -> None:
        self._pipe = self.loaded = None
        gc.collect()
        if self.settings.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
