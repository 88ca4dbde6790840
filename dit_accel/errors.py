"""Errors of the library's own; bad values raise plain `ValueError` and `TypeError`."""

from __future__ import annotations


class DitAccelError(Exception):
    """Base of the errors below."""


class UnavailableError(DitAccelError, RuntimeError):
    """Something that was asked for by name cannot run here; the message says why and what to do."""
