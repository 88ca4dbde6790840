"""Regions of Markdown files that programs write, between `<!-- NAME:begin -->` and `<!-- NAME:end -->`."""

from __future__ import annotations

from pathlib import Path

from dit_accel.files import read_text, write_text


def markers(name: str) -> tuple[str, str]:
    """The lines that begin and end a region."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def region(text: str, name: str) -> str:
    """What stands between the markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    begin, end = markers(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the file must have {begin} and {end} once each, in this order")
    return text.split(begin)[1].split(end)[0].strip("\n")


def replaced(text: str, name: str, body: str) -> str:
    """`text` with `body` between the markers; raises as `region`."""
    region(text, name)
    begin, end = markers(name)
    return f"{text.split(begin)[0]}{begin}\n{body}\n{end}{text.split(end)[1]}"


def write(path: Path, regions: dict[str, str]) -> None:
    """Writes each body into its region of the file; raises as `region`, before anything is written."""
    text = read_text(path)
    for name, body in regions.items():
        text = replaced(text, name, body)
    write_text(path, text)
