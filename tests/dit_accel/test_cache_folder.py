from pathlib import Path

import pytest

from dit_accel.cache_folder import user_cache_folder


@pytest.mark.parametrize("value", [None, "", "cache", "./cache", "../cache", "~/cache", "$HOME/cache"])
def test_what_is_not_absolute_is_ignored(monkeypatch, tmp_path, value):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert user_cache_folder() == tmp_path / ".cache"


def test_an_absolute_folder_is_taken(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/somebody")
    assert user_cache_folder() == Path("/var/cache/somebody")
