"""Regions of Markdown files that programs write."""

import pytest

from dit_accel.evals.reports import marked

BEGIN, END = marked.markers("table")


def test_what_is_written_is_read():
    text = marked.replaced(f"above\n{BEGIN}\nold\n{END}\nbelow\n", "table", "new\nlines")
    assert marked.region(text, "table") == "new\nlines"
    assert text == f"above\n{BEGIN}\nnew\nlines\n{END}\nbelow\n"


@pytest.mark.parametrize("text", ["", BEGIN, END + BEGIN, 2 * (BEGIN + END)])
def test_a_file_without_markers_is_refused(text):
    with pytest.raises(ValueError, match="once each"):
        marked.replaced(text, "table", "")


def test_nothing_is_written_where_one_region_is_missing(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"{BEGIN}\nold\n{END}\n")
    with pytest.raises(ValueError, match="other:begin"):
        marked.write(path, {"table": "new", "other": "new"})
    assert "old" in path.read_text()
