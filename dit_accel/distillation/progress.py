"""What a training shows: a progress bar, and a log for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_accel.optional import required

SMOOTHING = 0.9


class Progress:
    """A bar on stderr with the parts of the loss, smoothed, and a log of each step's.

    Args:
        steps: of the whole training.
        done: of them, those that were made before.
        log: folder of a TensorBoard log, which goes on after step `done`; None: none.
        bar: whether there is a bar.

    Raises:
        UnavailableError: a log, and TensorBoard is not installed.
    """

    def __init__(self, steps: int, done: int, log: str | Path | None, bar: bool):
        from tqdm import tqdm

        self._writer: Any = None
        if log is not None:
            required("tensorboard", "a log for TensorBoard", "distill")
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(log), purge_step=done + 1)
        self._bar = tqdm(total=steps, initial=done, desc="distill", disable=not bar)
        self._latest: Mapping[str, float] = {}
        self._smooth: dict[str, float] = {}

    def note(self, values: Mapping[str, float]) -> None:
        """Takes the values of the step that is made."""
        self._latest = values
        for name, value in values.items():
            self._smooth[name] = SMOOTHING * self._smooth.get(name, value) + (1 - SMOOTHING) * value

    def step(self, done: int) -> None:
        """Shows that so many steps are done."""
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in self._smooth.items()}, refresh=False)
        self._bar.update()
        for name, value in self._latest.items() if self._writer is not None else ():
            self._writer.add_scalar(name, value, done)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._writer is not None:
            self._writer.close()
