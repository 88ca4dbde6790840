"""The example prompts of the documentation are the same everywhere."""

from pathlib import Path

import pytest

from dit_accel.evals.reports import examples

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", ["IMAGE", "VIDEO"])
@pytest.mark.parametrize("file", ["Makefile", "README.md"])
def test_files_show_the_examples(file, name):
    assert getattr(examples, name) in (ROOT / file).read_text()


def test_the_first_snippet_of_the_readme_draws_the_example():
    assert f'"{examples.IMAGE}"' in (ROOT / "README.md").read_text().split("```python")[1]
