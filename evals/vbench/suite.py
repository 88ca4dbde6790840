"""VBench's prompts and file names, what a folder of videos lacks, and VBench itself in another environment.

Video i of a prompt is `{prompt}-{i}.mp4`. VBench wants 5 of each, and 25 of the prompts for temporal
flickering, of which its `static_filter` then picks 5 that do not move; its scores are of 0 to 4.

Source: VBench (arXiv 2311.17982), Vchitect/VBench at 45e79ec.
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dit_accel.errors import UnavailableError
from dit_accel.files import read_lines
from dit_accel.json_files import read_json

from .scores import RESULTS, SUITES

T2V = SUITES["t2v"]
FLICKERING = "temporal_flickering"
VIDEOS, FLICKERING_VIDEOS = 5, 25  # per prompt
LONGEST = 230  # bytes of a prompt that still make a file name, with room for a temporary one
FULL_INFO = "VBench_full_info.json"
NEED_PROMPTS = {  # what VBench cannot score without the details that its own prompts have
    "object_class", "multiple_objects", "color", "spatial_relationship", "scene", "appearance_style",
}  # fmt: skip
WHERE = """
import importlib.metadata, importlib.util, json
spec = importlib.util.find_spec("vbench")
versions = [one.version for one in importlib.metadata.distributions(name="vbench")]
print(json.dumps([spec and spec.origin, versions[0] if versions else None]))
"""


# -- prompts -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the dimensions that its videos are scored in.

    Raises:
        ValueError: a text that cannot be part of a file name.
    """

    text: str
    dimensions: tuple[str, ...] = ()

    def __post_init__(self):
        if "/" in self.text or "\0" in self.text or len(self.text.encode()) > LONGEST:
            raise ValueError(
                f"VBench's videos are named by their prompts, and this one cannot be: {self.text[:60]!r} (a "
                f"slash, or more than {LONGEST} bytes)"
            )

    def name(self, index: int) -> str:
        return f"{self.text}-{index}.mp4"

    def names(self, samples: int | None = None) -> list[str]:
        """The file names of its videos: `samples` of them, else as many as VBench wants."""
        wanted = FLICKERING_VIDEOS if FLICKERING in self.dimensions else VIDEOS
        return [self.name(index) for index in range(samples or wanted)]


def read_prompts(path: Path, dimensions: Sequence[str] = ()) -> list[Prompt]:
    """Prompts from VBench's full-info JSON, or a plain file with one per line; each text once.

    Args:
        path: ending in .json for the former.
        dimensions: of JSON, what to keep, else all; of plain lines, what they are for, else none.

    Raises:
        ValueError: a file that is missing, malformed or without a prompt for `dimensions`, or a dimension
            that VBench does not have.
    """
    T2V.check(dimensions)
    merged: dict[str, dict[str, None]] = {}
    if path.suffix == ".json":
        for prompt in _full_info(path, read_json(path, "prompts")):
            named = [name for name in prompt.dimensions if not dimensions or name in dimensions]
            if named:
                merged.setdefault(prompt.text, {}).update(dict.fromkeys(named))
    else:
        merged = {line: dict.fromkeys(dimensions) for line in read_lines(path)}
    if not merged:
        wanted = f" for {', '.join(dimensions)}" if dimensions else ""
        raise ValueError(f"{path} holds no prompts{wanted}")
    return [Prompt(text, tuple(names)) for text, names in merged.items()]


def _full_info(path: Path, entries: Any) -> list[Prompt]:
    prompts = []
    for entry in entries if isinstance(entries, list) else [entries]:
        try:
            text, names = entry["prompt_en"], tuple(entry["dimension"])
            T2V.check(names)
            prompts.append(Prompt(text, names))
        except (TypeError, KeyError, AttributeError):
            raise ValueError(
                f"{path} is not VBench's full-info JSON, a list of {{prompt_en, dimension}}: {entry!r:.80}"
            ) from None
    return prompts


def by_dimension(prompts: Iterable[Prompt]) -> dict[str, list[Prompt]]:
    """Prompts by dimension, in VBench's order; those without any are under ""."""
    prompts = list(prompts)
    groups = {name: [one for one in prompts if name in one.dimensions] for name in T2V.dimensions}
    groups[""] = [one for one in prompts if not one.dimensions]
    return {name: group for name, group in groups.items() if group}


# -- videos --------------------------------------------------------------------------------------------------


def damage(path: Path) -> str | None:
    """What keeps a file from being a whole MP4, by its boxes (ISO/IEC 14496-12); None if nothing does.

    Nothing is decoded, so this takes no time, and finds what is empty, cut off or something else.
    """
    size, position, kinds = path.stat().st_size, 0, set()
    if not size:
        return "empty"
    with path.open("rb") as file:
        while position < size:
            file.seek(position)
            header = file.read(16).ljust(16, b"\0")
            length, kind, long = struct.unpack(">I4sQ", header)
            length = {0: size - position, 1: long}.get(length, length)
            kinds.add(kind)
            if b"ftyp" not in kinds:
                return "no MP4"
            if length < 8 or position + length > size:
                return "cut off"
            position += length
    return None if {b"moov", b"mdat"} <= kinds else "cut off"


@dataclass(frozen=True)
class Found:
    """What a folder holds of the videos that prompts want.

    Attributes:
        whole, missing: file names.
        damaged: what is wrong, by file name.
        foreign: names of other things in the folder; hidden files are not counted.
    """

    whole: tuple[str, ...]
    missing: tuple[str, ...]
    damaged: dict[str, str]
    foreign: tuple[str, ...]

    @property
    def complete(self) -> bool:
        return not self.missing and not self.damaged

    def of(self, names: Iterable[str]) -> Found:
        """The part that is about some of the names."""
        names = set(names)
        whole, missing = (tuple(n for n in part if n in names) for part in (self.whole, self.missing))
        damaged = {name: reason for name, reason in self.damaged.items() if name in names}
        return replace(self, whole=whole, missing=missing, damaged=damaged)

    def describe(self, shown: int = 5) -> str:
        """How many videos are missing or damaged, and the first of their names."""
        parts = []
        for word, names in (("missing", self.missing), ("damaged", tuple(self.damaged))):
            if names:
                more = f" and {len(names) - shown} more" if len(names) > shown else ""
                parts.append(f"{len(names)} {word}: {', '.join(names[:shown])}{more}")
        return "; ".join(parts)


def find(folder: Path, prompts: Iterable[Prompt], samples: int | None = None) -> Found:
    """Looks for the videos of prompts; a folder that does not exist lacks them all.

    Raises:
        ValueError: a file in the folder's place.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; the videos need a folder")
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    wanted = [name for prompt in prompts for name in prompt.names(samples)]
    there = [name for name in wanted if name in present]
    damaged = {name: reason for name in there if (reason := damage(folder / name))}
    foreign = sorted(name for name in present.difference(wanted) if not name.startswith("."))
    return Found(
        tuple(name for name in there if name not in damaged),
        tuple(name for name in wanted if name not in present),
        damaged,
        tuple(foreign),
    )


# -- VBench itself -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Installed:
    """VBench in an environment of its own: its interpreter, and the package's folder and version."""

    python: str
    folder: Path
    version: str | None = None

    @classmethod
    def find(cls, python: str) -> Installed:
        """Asks an interpreter for its `vbench`, without importing it.

        Raises:
            UnavailableError: no such interpreter, or it has no `vbench`.
        """
        path = shutil.which(python)
        if path is None:
            raise UnavailableError(f"there is no interpreter {python}: give --vbench-python an existing one")
        asked = subprocess.run([path, "-c", WHERE], capture_output=True, text=True, check=False)
        origin, version = (None, None) if asked.returncode else json.loads(asked.stdout)
        if origin is None:
            raise UnavailableError(
                f"{path} has no vbench: pip install vbench in an environment of its own and give its "
                "interpreter with --vbench-python, or give --prompts"
            )
        return cls(path, Path(origin).parent, version)

    @property
    def full_info(self) -> Path:
        return self.folder / FULL_INFO

    def command(
        self, videos: Path, dimension: str, output: Path, full_info: Path, gpus: int = 1, custom: bool = False
    ) -> list[str]:
        """What scores one dimension. VBench's own command hides exit codes, so its script is called.

        Raises:
            UnavailableError: a version of vbench without that script.
        """
        script = self.folder / "launch" / "evaluate.py"
        if not script.is_file():
            raise UnavailableError(f"{self.folder} has no launch/evaluate.py: install vbench 0.1.5 or later")
        several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
        return [
            self.python,
            *(several if gpus > 1 else []),
            str(script),
            f"--videos_path={videos}",
            f"--output_path={output}",
            f"--full_json_dir={full_info}",
            f"--mode={'custom_input' if custom else 'vbench_standard'}",
            "--dimension",
            dimension,
        ]

    def evaluate(
        self, videos: Path, dimension: str, output: Path, full_info: Path, gpus: int = 1, custom: bool = False
    ) -> Path:
        """Scores one dimension; returns the result file, `{dimension}_eval_results.json` in `output`.

        What VBench prints goes to stderr. The file appears when VBench has ended well.

        Raises:
            UnavailableError: see `command`.
            ValueError: VBench ended with an error, or without a result.
        """
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{dimension}-", dir=output) as folder:
            places = videos.absolute(), dimension, Path(folder).absolute(), full_info.absolute()
            command = self.command(*places, gpus, custom)
            code = subprocess.run(command, stdout=2, check=False).returncode
            if code:
                raise ValueError(
                    f"vbench ended with exit code {code} in {dimension}; what it printed says why"
                )
            written = list(Path(folder).glob(f"*{RESULTS}"))
            if len(written) != 1:
                raise ValueError(
                    f"vbench ended well but wrote {len(written)} results of {dimension}, not one"
                )
            return written[0].replace(result_file(output, dimension))


def result_file(output: Path, dimension: str) -> Path:
    """Where `Installed.evaluate` puts the result of a dimension."""
    return output / f"{dimension}{RESULTS}"
