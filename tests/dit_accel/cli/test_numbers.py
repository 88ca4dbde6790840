"""Numbers of options: whatever is given, a command says what is wrong and ends with a documented code."""

import inspect
import typing

import pytest
from command_line import invoke
from typer.models import OptionInfo

from dit_accel.cli import app
from dit_accel.seeds import LARGEST_OPTION

BAD_INPUT, USAGE = 1, 2
NOT_INTEGERS = ("nan", "inf", "-inf", "1.5", "1e3", "", " ", "0x10", "ten", "9" * 5_000, "-" + "9" * 5_000)
NOT_FLOATS = ("nan", "-nan", "inf", "-inf", "1e400", "", "ten", "1,5", "1" * 400)
MODEL = ("--model", "tiny-flux")
NEEDED = {  # of the commands: what makes them get as far as their numbers
    "generate": (*MODEL, "--prompt", "a"),
    "compare": (*MODEL, "--prompt", "a", "--recipe", "tiny-flux-clear"),
    "plan": (*MODEL, "--recipe", "tiny-flux-clear"),
    "calibrate": (*MODEL, "--density", "0.5"),
    "distill": (*MODEL, "--recipe", "tiny-flux-clear", "--prompt", "a"),
    "hunt": (*MODEL, "--objective", "attributes", "--no-pictures"),
    "eval attributes": MODEL,
    "eval sweep": (*MODEL, "--no-plot"),
    "eval vbench generate": ("--model", "tiny-wan"),
}


def commands(group=app, words=()):
    """(words, function) of every command."""
    for command in group.registered_commands:
        yield (*words, command.name or command.callback.__name__), command.callback
    for inner in group.registered_groups:
        yield from commands(inner.typer_instance, (*words, inner.name))


def name_of(option):
    """An option's long name; Typer keeps the first of the names in an annotation as a default."""
    return next(name for name in (option.default, *option.param_decls) if name.startswith("--"))


def options(kind):
    """(words of a command, option) of every option that takes numbers of a kind."""
    found = []
    for words, function in commands():
        for hint in typing.get_type_hints(inspect.unwrap(function), include_extras=True).values():
            option = next((one for one in typing.get_args(hint)[1:] if isinstance(one, OptionInfo)), None)
            if option and kind in (typing.get_args(hint)[0], *typing.get_args(typing.get_args(hint)[0])):
                found.append(pytest.param(words, option, id=" ".join([*words, name_of(option)])))
    return found


INTEGERS, FLOATS = options(int), options(float)


def outcome(words, option, value, tmp_path):
    """Exit code and stderr; anything but an exit is raised."""
    line = [*words, *NEEDED.get(" ".join(words), ())]
    function = next(function for known, function in commands() if known == words)
    for name in ("out", "test", "ref", "videos"):
        known = inspect.signature(function).parameters.get(name)
        if known and known.default is inspect.Parameter.empty:
            line += [f"--{name}", str(tmp_path / name)]
    result = invoke(app, [*line, f"{name_of(option)}={value}"])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.stderr
    return result.exit_code, " ".join(result.stderr.replace("│", " ").split())


def test_there_are_numbers():
    assert len(INTEGERS) > 15
    assert len(FLOATS) > 4


@pytest.mark.parametrize(("words", "option"), INTEGERS)
def test_whole_numbers_have_bounds(words, option):
    assert option.min in (0, 1)
    assert option.min < option.max <= LARGEST_OPTION


@pytest.mark.slow
@pytest.mark.parametrize(("words", "option"), INTEGERS)
def test_what_is_no_whole_number_within_them_is_wrong_usage(words, option, tmp_path):
    for value in (*NOT_INTEGERS, option.min - 1, option.max + 1, 10**30, 2**64):
        code, message = outcome(words, option, value, tmp_path)
        assert code == USAGE, str(value)[:20]
        assert name_of(option) in message
    assert str(option.max) in message


@pytest.mark.parametrize(("words", "option"), FLOATS)
def test_other_numbers_are_finite(words, option, tmp_path):
    for value in (*NOT_FLOATS, *(["-1"] if name_of(option) != "--scale" else [])):
        code, message = outcome(words, option, value, tmp_path)
        assert code in (BAD_INPUT, USAGE), value[:20]
        assert name_of(option).lstrip("-") in message, "the option is named"
        assert len(message) < 1_500
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", "", "much", "1 2"])
@pytest.mark.parametrize("name", ["attributes", "", "attributes=3"])
def test_minima_of_a_hunt_are_finite(name, value, tmp_path):
    line = ["hunt", *NEEDED["hunt"], "--out", str(tmp_path / "hunt"), "--at-least", f"{name}={value}"]
    result = invoke(app, line)
    assert result.exit_code == 1
    assert "`--at-least` must be OBJECTIVE=MINIMUM" in result.stderr
    assert not list(tmp_path.iterdir())


def test_seeds_have_one_bound():
    seeds = [one.values[1] for one in INTEGERS if name_of(one.values[1]) == "--seed"]
    assert len(seeds) > 4
    assert {(seed.min, seed.max) for seed in seeds} == {(0, LARGEST_OPTION)}
