"""`docs/reliability.md` names tests that exist."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"
NAME = re.compile(r"`((?:[\w/]+\.py)?::\w+)`")


def named():
    """(file, function or class) of every test on the page; a name without a file is of the file before it."""
    found, file = [], None
    for path, name in (match.split("::") for match in NAME.findall(PAGE.read_text(encoding="utf-8"))):
        file = path or file
        found.append((file, name))
    return found


@pytest.mark.parametrize(("file", "name"), sorted(set(named())))
def test_a_named_test_exists(file, name):
    text = (TESTS / file).read_text(encoding="utf-8")
    assert re.search(rf"^ *(def|class) {name}\b", text, re.MULTILINE), f"{file} has no {name}"
    assert name.lower().startswith("test"), "pytest would not run it"


def test_every_promise_names_a_test():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    promises = [row for row in rows if row != "| promise | test |"]
    assert len(promises) > 10
    for row in promises:
        assert NAME.search(row.split(" | ")[-1]), row
        first = NAME.search(row).group(1)
        assert not first.startswith("::"), f"the first test of a row needs its file: {row}"
