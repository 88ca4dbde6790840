"""Threads that stay, for what takes much memory: the server makes and ends its own as visitors come and go.

glibc lends each new thread one of its heaps, and what is freed there stays with that heap. Runs that took
whichever thread there was left some memory in every heap: 0.4 MiB an answer, none of it in use.
"""

from __future__ import annotations

import contextvars
import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Threads:
    """`count` threads, made when they are first needed."""

    def __init__(self, count: int, name: str):
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a function returns or raises in one of them, in the caller's context (Gradio's event)."""
        context = contextvars.copy_context()
        return self._pool.submit(context.run, functools.partial(function, *args, **kwargs)).result()

    def end(self) -> None:
        """Takes no more; what runs goes on to its end."""
        self._pool.shutdown(wait=False, cancel_futures=True)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """That of glibc; None where the C library is another one."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def give_back_memory() -> None:
    """Pages that nothing is in any more, of all heaps, go back to the system, where glibc can do that."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
