"""The page: `dit-accel demo` starts it, and so does a Hugging Face Space, whose `app_file` this is."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from starlette.middleware import Middleware

import dit_accel
from dit_accel.demos import evaluate, generate, heads, highres, masks
from dit_accel.demos.gate import Gate
from dit_accel.demos.sessions import Sessions
from dit_accel.demos.settings import Settings
from dit_accel.demos.tab import Studio, told
from dit_accel.demos.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Sequence

TABS = (generate.TAB, masks.TAB, heads.TAB, highres.TAB, evaluate.TAB)
STYLE = Path(__file__).with_name("style.css")
TITLE = "dit-accel"
HEADER = """
<header class="masthead"><h1>dit-accel</h1>
<p>Block-sparse attention for diffusion transformers: same model, same seed, fewer pairs.</p></header>
"""


def page(studio: Studio) -> gr.Blocks:
    """All tabs on one page."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(HEADER, js_on_load="")
        with gr.Tabs():
            for tab in TABS:
                with gr.Tab(tab.title, id=tab.title):
                    tab.build(studio)

        blocks.unload(told(_leave, studio))
    caps = studio.settings.caps
    return blocks.queue(max_size=caps.waiting, default_concurrency_limit=2, api_open=False)


def _leave(studio: Studio, browser: gr.Request) -> None:
    """The visitor has closed the tab."""
    studio.sessions.end(browser.session_hash)


def theme() -> gr.themes.Base:
    """Quiet: one accent, fonts of the visitor's machine, nothing fetched from elsewhere."""
    return gr.themes.Base(
        primary_hue="teal",
        neutral_hue="slate",
        font=["ui-sans-serif", "system-ui", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "monospace"],
        radius_size="md",
        spacing_size="md",
    )


@contextmanager
def served(
    settings: Settings,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    auth: Sequence[tuple[str, str]] | None = None,
    quiet: bool = False,
) -> Iterator[tuple[str, Studio]]:
    """The running server, for the length of a `with` block: its address and what its tabs share.

    Every file that it makes is in one new folder, which is deleted at the end.

    Args:
        settings: models, device and caps.
        host, port: where it listens; None takes the first free port from 7860.
        share: whether Gradio makes a public address for it.
        auth: (name, password) pairs that visitors need.
        quiet: whether the address is not printed.
    """
    root = Path(tempfile.mkdtemp(prefix="dit-accel-demo-")).resolve()
    before = {name: os.environ.get(name) for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED")}
    os.environ |= {"GRADIO_TEMP_DIR": str(root), "GRADIO_ANALYTICS_ENABLED": "False"}
    studio = Studio(settings, Worker(settings), Sessions(root, settings.caps))
    blocks = None
    try:
        blocks = page(studio)
        gate = Middleware(Gate, root=root, body=settings.caps.body)
        _, address, shared = blocks.launch(
            server_name=host,
            server_port=port,
            share=share,
            auth=list(auth) if auth else None,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            max_file_size=settings.caps.body,
            enable_monitoring=False,
            state_session_capacity=settings.caps.visitors,
            ssr_mode=False,
            _frontend=False,  # that it asks for its own page first, for 3 s: too few on a busy machine
            app_kwargs={"middleware": [gate]},
            footer_links=["api"],
            theme=theme(),
            css=STYLE.read_text(encoding="utf-8"),
        )
        if not quiet:
            print(f"{TITLE} {dit_accel.__version__}: {shared or address}", flush=True)
        yield address, studio
    finally:
        studio.end()
        if blocks is not None:
            with suppress(Exception):  # it may not have started
                blocks.close(verbose=False)
        shutil.rmtree(root, ignore_errors=True)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def for_this_machine(**given: Any) -> Settings:
    """Settings for the fastest device that is here."""
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    return Settings(device, torch.bfloat16 if cuda else torch.float32, **given)


def main() -> None:
    """Serves until it is stopped: a Space says by its environment where to listen."""
    import threading

    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    port = os.environ.get("GRADIO_SERVER_PORT")
    with served(for_this_machine(), host=host, port=int(port) if port else None), suppress(KeyboardInterrupt):
        threading.Event().wait()


if __name__ == "__main__":
    main()
