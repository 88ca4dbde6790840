"""Runs for the tabs that generate: dense and by recipes, from one seed, with progress, cancel and files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from dit_accel.generation import DENSE, Request, Run
from dit_accel.recipe.recipe import Recipe

from .sessions import Cancelled, Session
from .tab import Studio

FPS = 8


@dataclass(frozen=True)
class Shown:
    """One finished run, its file, and what stands under it."""

    label: str
    run: Run
    density: float
    path: Path

    @property
    def video(self) -> bool:
        return self.path.suffix == ".mp4"


def run(
    studio: Studio,
    session: Session,
    model: str,
    request: Request,
    recipes: Sequence[tuple[str, Recipe | None]],
    progress: gr.Progress,
) -> tuple[Request, list[Shown]]:
    """Runs every recipe in turn, None dense, on the shared pipeline, and writes the files.

    Returns:
        the request with what the pipeline filled in, and a `Shown` for every recipe.

    Raises:
        Cancelled: at the end of the step in which the visitor cancelled.
        ValueError: a request or recipe that this model cannot follow, before anything runs.
    """
    return in_its_thread(_run, studio, session, model, progress, request, recipes)


def in_its_thread(
    function: Callable[..., Any],
    studio: Studio,
    session: Session,
    model: str,
    progress: gr.Progress,
    *args: Any,
) -> Any:
    """What a run of this visitor returns, in the thread that runs have, with the event that stops it."""
    with session.run() as stop:
        progress(0, desc=f"loading {model}" if studio.worker.loaded != model else "starting")
        return studio.running.call(function, studio, session, model, progress, *args, stop)


def _run(
    studio: Studio,
    session: Session,
    model: str,
    progress: gr.Progress,
    request: Request,
    recipes: Sequence[tuple[str, Recipe | None]],
    stop: threading.Event,
) -> tuple[Request, list[Shown]]:
    from dit_accel import accelerated, media
    from dit_accel.generation import build_masks, check_request, execute, is_video

    with studio.worker.pipeline(model) as pipe:
        check(stop)
        request = request.with_steps(pipe)
        check_request(pipe, request)
        for _, recipe in recipes:  # what does not fit is refused before any work
            if recipe is not None:
                with accelerated(pipe, recipe):
                    build_masks(pipe, request)
        done, video = [], is_video(pipe)
        for place, (label, recipe) in enumerate(recipes):
            check(stop)
            on_step = _counter(progress, stop, label, place, len(recipes), request.steps)
            if recipe is None:
                done.append((label, execute(pipe, request, None, on_step), 1.0))
            else:
                with accelerated(pipe, recipe) as handle:
                    made = execute(pipe, request, None, on_step)
                    done.append((label, made, handle.run_density))
    check(stop)
    with session.result() as folder:
        names = [f"{label}.mp4" if video else f"{label}.png" for label, _, _ in done]
        paths = [
            media.save(folder / name, made.frames, FPS)
            for name, (_, made, _) in zip(names, done, strict=True)
        ]
    _, height, width, _ = done[0][1].frames.shape
    request = Request(**{**vars(request), "width": width, "height": height})
    return request, [Shown(*values, path) for values, path in zip(done, paths, strict=True)]


def check(stop: threading.Event) -> None:
    """Raises Cancelled if the visitor wants the run to stop."""
    if stop.is_set():
        raise Cancelled


def _counter(
    progress: gr.Progress, stop: threading.Event, label: str, place: int, runs: int, steps: int
) -> Callable[[int], None]:
    """What is called after each step: says how far it is, and stops the run if the visitor wants that."""

    def count(step: int) -> None:
        check(stop)
        done = (place * steps + step, runs * steps)
        progress(done, desc=f"{label}, step {step} of {steps}", unit="steps")

    return count


def cancel(studio: Studio, browser: gr.Request) -> None:
    """Stops this visitor's runs at the end of the step they are in."""
    studio.sessions.of(browser.session_hash).cancel()


def figures(shown: Sequence[Shown]) -> list[dict[str, Any]]:
    """Plain data for what stands under the pictures; speed-up and PSNR are to the first, if dense."""
    from dit_accel.evals.metrics.fidelity import psnr

    first, rows = shown[0], []
    for one in shown:
        row = {
            "label": one.label,
            "seconds": round(one.run.seconds, 3),
            "step_seconds": round(one.run.median_step_seconds, 4),
            "density": None if one.density is None else round(one.density, 4),
            "speedup": None,
            "psnr": None,
            "identical": False,
        }
        if one is not first and first.label == DENSE:
            row["speedup"] = round(first.run.median_step_seconds / one.run.median_step_seconds, 3)
            row["identical"] = bool(np.array_equal(one.run.frames, first.run.frames))
            value = psnr(one.run.frames, first.run.frames)
            row["psnr"] = None if row["identical"] or value is None else round(float(value), 2)
        rows.append(row)
    return rows
