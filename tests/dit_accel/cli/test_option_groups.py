"""Groups of options: typer shows their fields, and a command gets them as one value."""

import inspect
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from command_line import invoke

from dit_accel.cli.option_groups import Judging, grouped


@dataclass(frozen=True, kw_only=True)
class Pair:
    first: Annotated[int, typer.Option("--first", help="The first.")] = 1
    second: Annotated[bool, typer.Option("--second", help="The second.")] = False


@pytest.fixture
def run():
    app, seen = typer.Typer(), []

    @app.command()
    @grouped
    def command(
        name: Annotated[str, typer.Option("--name")], *, pair: Pair, last: Annotated[int, typer.Option()] = 7
    ) -> None:
        seen.append((name, pair, last))

    def call(*arguments: str):
        result = invoke(app, arguments)
        assert result.exit_code == 0, result.output
        return seen[-1] if seen else result.output

    return call


def test_a_command_gets_its_groups(run):
    assert run("--name", "x") == ("x", Pair(first=1, second=False), 7)
    assert run("--name", "x", "--first", "3", "--second", "--last", "8") == (
        "x",
        Pair(first=3, second=True),
        8,
    )


def test_help_lists_the_options_in_the_place_of_the_group(run):
    shown = run("--help")
    places = [shown.index(option) for option in ("--name", "--first", "--second", "--last")]
    assert places == sorted(places)
    assert "--pair" not in shown


def test_commands_without_a_group_are_as_they_were():
    @grouped
    def command(name: str = "x") -> str:
        return name

    assert list(inspect.signature(command).parameters) == ["name"]
    assert command(name="y") == "y"


def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="`--out` must name a file, got the folder"):
        Judging(out=tmp_path)
