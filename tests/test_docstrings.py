"""Every module, public class and public function says in its first line what it is."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("dit_accel", "kernels", "pipelines", "evals")
FILES = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
LONGEST = 110


def public(source: str) -> Iterator[tuple[str, str]]:
    """Names of a module, `""` for itself, with the first line of each docstring."""
    tree = ast.parse(source)
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    named = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    for node in (tree, *named):
        yield getattr(node, "name", ""), (ast.get_docstring(node) or "").partition("\n")[0]


def missing(source: str) -> list[str]:
    """Names without a first line, or with one that is too long."""
    return [name for name, line in public(source) if not 0 < len(line) <= LONGEST]


def test_first_lines_say_what_a_thing_is():
    assert len(FILES) > 150
    assert not {str(file): names for file in FILES if (names := missing(file.read_text()))}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("x = 1", [""]),
        ('"""A module."""\ndef f(): pass\ndef _g(): pass', ["f"]),
        ('"""A module."""\nclass C:\n    x = 1', ["C"]),
        (f'"""{"long " * 30}"""', [""]),
    ],
)
def test_what_is_missing_is_found(source, names):
    assert missing(source) == names
