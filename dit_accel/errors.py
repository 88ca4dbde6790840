"""Errors of the library's own; bad values raise plain `ValueError` and `TypeError`."""

from __future__ import annotations


class DitAccelError(Exception):
    """Base of the errors below."""


class NonFiniteError(DitAccelError, ArithmeticError):
    """A run turned NaN or infinite; the message says at which step, in which layer, and what to do."""


class UnavailableError(DitAccelError, RuntimeError):
    """Something that was asked for by name cannot run here; the message says why and what to do."""
