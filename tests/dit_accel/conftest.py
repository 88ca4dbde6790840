"""Fixtures: commands of `dit-accel`, run in this process."""

from __future__ import annotations

import json
import sys
from unittest import mock

import pytest


class Command:
    """`dit-accel` and the words in front of all arguments."""

    def __init__(self, *words: str):
        self.words = words

    def run(self, *arguments, code: int = 0):
        """The result, whose exit code must be `code`."""
        from command_line import invoke

        from dit_accel.cli import app

        line = [*self.words, *map(str, arguments)]
        with mock.patch.object(sys, "argv", ["dit-accel", *line]):  # results name their command
            result = invoke(app, line)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, f"exit code {result.exit_code}\n{result.output}"
        return result

    def error(self, *arguments, code: int = 1) -> str:
        """The last line on stderr of a command that fails with `code`."""
        lines = self.run(*arguments, code=code).stderr.strip().splitlines()
        assert lines[-1].startswith("error: "), lines
        assert "Traceback" not in "".join(lines)
        return lines[-1]

    def usage(self, *arguments) -> str:
        """What wrong usage prints, out of its box."""
        return " ".join(self.run(*arguments, code=2).stderr.replace("│", " ").split())


@pytest.fixture(scope="session")
def cli_of() -> type[Command]:
    return Command


@pytest.fixture(scope="session")
def strict():
    """Reads JSON that has no NaN and no Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} in the JSON")

    return lambda text: json.loads(text, parse_constant=refuse)
