"""Folders of visitors: made, bounded and gone; runs cancelled by their own visitor alone."""

import pytest

from dit_accel.demos.sessions import Cancelled, Sessions
from dit_accel.demos.settings import Caps


@pytest.fixture
def sessions(tmp_path):
    return Sessions(tmp_path, Caps(kept=2, idle=100))


def write(session):
    with session.result() as folder:
        (folder / "picture.png").write_bytes(b"x")
    return folder


def test_one_folder_a_session_that_no_other_can_guess(sessions, tmp_path):
    first, second = sessions.of("a"), sessions.of("b")
    assert sessions.of("a") is first
    assert first.folder.parent == second.folder.parent == tmp_path
    assert len(first.folder.name) >= 32
    assert first.folder.stat().st_mode & 0o077 == 0


def test_the_latest_results_are_kept(sessions):
    folders = [write(sessions.of("a")) for _ in range(4)]
    assert [folder.exists() for folder in folders] == [False, False, True, True]


def test_the_folder_goes_with_the_session(sessions, tmp_path):
    write(sessions.of("a"))
    sessions.end("a")
    sessions.end("a")
    assert list(tmp_path.iterdir()) == []
    assert len(sessions) == 0


def test_a_run_that_ends_after_its_session_leaves_nothing(sessions, tmp_path):
    session = sessions.of("a")
    with session.run() as stop:
        sessions.end("a")
        assert stop.is_set()
        with pytest.raises(Cancelled), session.result():
            pass
    assert list(tmp_path.iterdir()) == []


def test_cancel_is_of_ones_own_runs_that_run_now(sessions):
    mine, other = sessions.of("a"), sessions.of("b")
    with mine.run() as stop, other.run() as theirs:
        assert mine.cancel() == 1
        assert stop.is_set()
        assert not theirs.is_set()
    assert mine.cancel() == 0
    with mine.run() as later:
        assert not later.is_set()


def test_who_left_without_a_word_is_forgotten(sessions, tmp_path):
    sessions.of("a").used -= 1000
    sessions.of("b")
    assert len(sessions) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_all_end_with_the_server(sessions, tmp_path):
    for key in "abc":
        write(sessions.of(key))
    sessions.end_all()
    assert list(tmp_path.iterdir()) == []
