from pathlib import Path

import pytest


def test_every_cell_of_the_matrix_has_a_test(request):
    """And every test that is a cell stands in the matrix; what it says there each of them checks itself."""
    conftest = next(p for p in request.config.pluginmanager.get_plugins() if hasattr(p, "read_table"))
    collected = request.config.stash[conftest.COLLECTED]
    if not set(Path(__file__).parent.glob("test_*.py")) <= {path for path, _ in collected}:
        pytest.skip("needs the whole folder")
    cells = [key for _, key in collected if key is not None]
    assert len(cells) == len(set(cells))
    assert set(cells) == set(conftest.read_table())
