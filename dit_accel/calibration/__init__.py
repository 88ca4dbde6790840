"""Calibration: what each head of a model should compute, from what it attends to on a few prompts."""

from .run import calibrate

__all__ = ["calibrate"]
