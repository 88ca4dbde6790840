"""What holds for every command here."""

import pytest


@pytest.fixture(autouse=True)
def _nothing_in_the_checkout(tmp_path_factory, monkeypatch):
    """Without `--out` a command writes into the current folder, which is none of the checkout's."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
