"""What every tab is, and what all tabs share: a new tab is one module with a `TAB`, listed in `app.TABS`."""

from __future__ import annotations

import functools
import html
import inspect
import logging
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from dit_accel.errors import DitAccelError

from .sessions import Cancelled, Sessions
from .settings import Settings
from .threads import Threads
from .worker import NoMemory, Worker

# what runs one at a time, what needs no model, and what needs its class, whose first import takes seconds
MODEL_QUEUE, LOOK_UPS, CLASSES = "model", "look-ups", "classes"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Studio:
    """What a tab is built with.

    Attributes:
        settings, worker, sessions: see there.
        running, drawing: threads for what uses the pipeline, and for what draws.
    """

    settings: Settings
    worker: Worker
    sessions: Sessions
    running: Threads = field(default_factory=lambda: Threads(1, "run"))
    drawing: Threads = field(default_factory=lambda: Threads(2, "draw"))

    def end(self) -> None:
        """The server stops: so do all runs, and no file stays."""
        self.sessions.end_all()
        self.running.end()
        self.drawing.end()


@dataclass(frozen=True)
class Tab:
    """A tab of the page.

    Attributes:
        title: what it is called.
        build: adds its components and events, within the tab's `gr.Tab`. Every event has an `api_name` and a
            `concurrency_id`: `MODEL_QUEUE` where it uses the pipeline, `CLASSES` where a model's class, else
            `LOOK_UPS`; functions are decorated by `told`.
    """

    title: str
    build: Callable[[Studio], None]


def told(function: Callable[..., Any], *first: Any) -> Callable[..., Any]:
    """What answers an event: `function` with its first arguments given, whose errors are told in words.

    What nobody foresaw is logged, and told as no more than that. Gradio reads types and parameters from it.
    """
    parameters = list(inspect.signature(function).parameters.values())[len(first) :]

    @functools.wraps(function)
    def answer(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*first, *args, **kwargs)
        except gr.Error:  # a ValueError, which is told already
            raise
        except Cancelled:
            raise _message("The run was stopped.", "Cancelled", 3) from None
        except NoMemory as error:
            raise _message(str(error), "Out of memory") from None
        except (ValueError, TypeError, OSError, DitAccelError) as error:
            raise _message(str(error), "Please check") from None
        except Exception:
            log.exception("an event of the demo failed")
            raise _message("Something went wrong here; the server's log says what.", "Error") from None

    hints = typing.get_type_hints(function)
    answer.__annotations__ = {one.name: hints[one.name] for one in parameters if one.name in hints}
    answer.__signature__ = inspect.Signature(parameters)
    del answer.__wrapped__
    return answer


def _message(text: str, title: str, seconds: float = 30) -> gr.Error:
    """As text, never as markup: it may quote what a visitor wrote."""
    short = text if len(text) <= 600 else text[:600] + "…"
    return gr.Error(html.escape(short.replace("`", "")), duration=seconds, title=title, print_exception=False)


def export_area(label: str = "Reproduce this") -> list[gr.Code]:
    """The three ways to make again what a tab shows: recipe, Python and command line."""
    with gr.Accordion(label, open=False, elem_classes="export"), gr.Tabs():
        with gr.Tab("Command line"):
            command = gr.Code(language="shell", interactive=False, show_label=False, lines=4, wrap_lines=True)
        with gr.Tab("Python"):
            python = gr.Code(language="python", interactive=False, show_label=False, lines=4)
        with gr.Tab("Recipe"):
            recipe = gr.Code(language="yaml", interactive=False, show_label=False, lines=4)
    return [recipe, python, command]
