"""Which prompt each file of a folder was made from, out of one file of prompts.

- JSON: an object from file names, as they are below the folder, to prompts; or what a sweep wrote of itself,
  `sweep.json` or `runs.json`, for its `media/{setting}`.
- Else lines, as a sweep and `eval vbench generate` were given them: `007.png` is of line 7, the first being 0
  and empty ones not counted, and `{line}-{i}.mp4` of that line.

Every file has one prompt, and every prompt has a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from dit_accel.files import read_lines
from dit_accel.json_files import read_json

SHOWN = 5  # names in a message


def read(path: Path) -> list[str]:
    """The lines of a file or pipe of prompts, without empty ones; see `files.read_lines`.

    Raises:
        ValueError: no such file, one that is empty, or not text in UTF-8.
    """
    try:
        return read_lines(path)
    except ValueError as error:
        raise ValueError(f"`--prompts`: {error}") from None


def of_files(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Prompts by file name.

    Args:
        path: the file of prompts; JSON if it ends in .json.
        names: of the files, relative to their folder.

    Raises:
        ValueError: a file of another form, a name without a prompt, or a prompt without a file.
    """
    if path.suffix != ".json":
        return _of_lines(path, read(path), names)
    found = _read(path)
    if "schema" in found:
        settings = found.get("settings")
        lines = settings.get("prompts") if isinstance(settings, dict) else None
        if not isinstance(lines, list):
            raise ValueError(f"{path} is no sweep's: its schema is {found['schema']!r}, without prompts")
        return _of_lines(path, lines, names)
    _refuse(path, "files have no prompt", [name for name in names if name not in found])
    _refuse(path, "names have no file", [name for name in found if name not in set(names)])
    for name, prompt in found.items():
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{path}: the prompt of {name} must be a text, got {prompt!r}")
    return found


def _read(path: Path) -> dict[str, Any]:
    found = read_json(path, "prompts")
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be an object from file names to prompts, got {found!r:.80}")
    return found


def _of_lines(path: Path, lines: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    known, found = set(lines), {}
    for name in names:
        stem = PurePosixPath(name).stem
        line, _, index = stem.rpartition("-")
        if _is_number(index) and line in known:
            found[name] = line
        elif _is_number(stem) and int(stem) < len(lines):
            found[name] = lines[int(stem)]
    _refuse(path, "files have no prompt", [name for name in names if name not in found])
    _refuse(path, "prompts have no file", [repr(line) for line in known.difference(found.values())])
    return found


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _refuse(path: Path, what: str, names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise ValueError(f"by {path}, {len(names)} {what}: {', '.join(sorted(names)[:SHOWN])}{more}")
