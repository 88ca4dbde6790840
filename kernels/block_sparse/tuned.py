"""Launch configurations measured on a GPU: `tuned.json`, written by `python -m dit_accel.evals.gpu_bench`.

The file lies beside this module and comes before the kernel's own table. Without it, and on a GPU that it
does not name, nothing was measured and the kernel's own table holds. Each entry says on which GPU, with
which versions and at which commit it was measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

PATH = Path(__file__).with_name("tuned.json")
KERNELS = ("pointer", "tma", "gluon")  # of the forward pass: `triton_forward`, `triton_tma`, `triton_gluon`
BACKWARD_KERNELS = ("pointer", "tma")  # `triton_backward`, `triton_tma_backward`
BACKWARD_PARTS = ("dq", "dkv")  # of which each has its own
RANGES = {  # what an entry may say; rows and keys divide every block of a mask, or are cut to it
    "kernel": KERNELS,
    "block_keys": (64, 128),
    "element_bytes": (2, 4),
    "head_dim": (64, 128, 256),
    "rows": (32, 64, 128),
    "keys": (32, 64, 128),
    "warps": (4, 8),
    "stages": (1, 2, 3, 4, 5, 6, 7, 8),
    "format": ("none", "int8", "int8-fp8"),  # "none": the numbers' own
    "ping_pong": (False, True),
    "persistent": (False, True),
    "part": ("forward", *BACKWARD_PARTS),
}
REMEDY = "delete it, or measure again with `python -m dit_accel.evals.gpu_bench`"


class Launch(NamedTuple):
    """Query rows and keys that a program takes at a time, its warps, and the stages of its pipeline.

    Of which kernel, on masks whose blocks have how many keys, 64 or 128, and in which numeric format. What
    the kernel in Gluon may do besides: `ping_pong`, its two groups of warps take turns at the tensor cores;
    `persistent`, a program for each multiprocessor takes tile after tile. `part` is what the kernel computes:
    the forward pass, dQ, or dK and dV.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    kernel: str = "pointer"
    block_keys: int = 64
    format: str = "none"
    ping_pong: bool = False
    persistent: bool = False
    part: str = "forward"

    @property
    def kind(self) -> tuple[str, int, str, str]:
        """What it is the launch of: kernel, keys of a block, format, part. The fastest of each is kept."""
        return self.kernel, self.block_keys, self.format, self.part


@dataclass(frozen=True)
class Entry:
    """The fastest launch of a kernel for a compute capability, bytes per element and largest padded head_dim.

    Attributes:
        capability: as in `"9.0"`.
        kernel: one of `KERNELS`.
        block_keys: of the masks that it was measured on; 64 stands for fewer as well, and of the backward
            pass, whose tiles are the same on wider blocks, for all.
        element_bytes: of the inputs, whatever the format.
        format: of `quantization`, or `"none"`.
        ping_pong, persistent, part: as of `Launch`.
        gain: times as many pairs of a query and a key per second as the kernel with pointers for the same
            part under its own table on blocks of 64 keys and without a format, the geometric mean over some
            shapes.
        gpu, torch, triton, cuda, commit: what it was measured with.
    """

    capability: str
    element_bytes: int
    head_dim: int
    rows: int
    keys: int
    warps: int
    stages: int
    gain: float
    gpu: str
    torch: str
    triton: str
    cuda: str
    commit: str
    kernel: str = "pointer"
    block_keys: int = 64
    format: str = "none"
    ping_pong: bool = False
    persistent: bool = False
    part: str = "forward"

    def __post_init__(self) -> None:
        for name, allowed in RANGES.items():
            value = getattr(self, name)
            if type(value) is not type(allowed[0]) or value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(map(str, allowed))}, got {value!r}")
        if self.kernel != "gluon" and (self.ping_pong or self.persistent):
            raise ValueError(f"`ping_pong` and `persistent` are of the kernel 'gluon', got {self.kernel!r}")
        backward = self.kernel in BACKWARD_KERNELS and self.block_keys == 64 and self.format == "none"
        if self.part in BACKWARD_PARTS and not backward:
            known = " and ".join(map(repr, BACKWARD_KERNELS))
            raise ValueError(
                f"`part` {self.part!r} is of the kernels {known} with `block_keys` 64 and `format` 'none', "
                f"got {self.kernel!r}, {self.block_keys} and {self.format!r}"
            )
        numbers = str(self.capability).split(".")
        if not isinstance(self.capability, str) or len(numbers) != 2 or not all(map(str.isdecimal, numbers)):
            raise ValueError(f"`capability` must be like '9.0', got {self.capability!r}")
        if type(self.gain) not in (int, float) or not 0 < self.gain < float("inf"):
            raise ValueError(f"`gain` must be a positive number, got {self.gain!r}")
        for name in ("gpu", "torch", "triton", "cuda", "commit"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"`{name}` must be text, got {getattr(self, name)!r}")

    @property
    def key(self) -> tuple[tuple[int, ...], int, int, str, int, str, str]:
        numbers = tuple(map(int, self.capability.split(".")))
        return numbers, self.element_bytes, self.head_dim, *self.launch.kind

    @property
    def launch(self) -> Launch:
        return Launch(*(getattr(self, name) for name in Launch._fields))


def load(path: Path) -> dict[tuple, Entry]:
    """The entries of a file by their keys; none where there is no file.

    Raises:
        ValueError: a file that is not such a table, naming the file, the entry and what is wrong with it.
    """
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text())
        items = data["entries"]
        if not isinstance(items, list):
            raise TypeError("`entries` is not a list")
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ValueError(f"{path} is not a table of launch configurations ({error!r}); {REMEDY}") from error
    names, entries = {field.name for field in fields(Entry)}, {}
    for number, item in enumerate(items):
        try:
            if not isinstance(item, dict) or set(item) != names:
                raise ValueError(
                    f"it must have exactly the fields {', '.join(sorted(names))}, got {item!r:.200}"
                )
            entry = Entry(**item)
            if entry.key in entries:
                raise ValueError(f"there are two for {entry.key}")
        except ValueError as error:
            raise ValueError(f"{path}, entry {number}: {error}; {REMEDY}") from error
        entries[entry.key] = entry
    return entries


def save(path: Path, entries: Iterable[Entry]) -> None:
    """Writes entries into a table, which keeps its others: all of it or nothing."""
    table = load(path) | {entry.key: entry for entry in entries}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    content = {"entries": [asdict(table[key]) for key in sorted(table)]}
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@cache
def _read() -> dict[tuple, Entry]:
    return load(PATH)


def find(
    capability: tuple[int, int],
    element_bytes: int,
    head_dim: int,
    kernel: str = "pointer",
    block_keys: int = 64,
    format: str = "none",
    part: str = "forward",
) -> Launch | None:
    """The launch of a kernel measured for exactly this compute capability and padded head_dim, or None.

    On blocks of 128 keys, where that was not measured, the one on blocks of 64.

    Raises:
        ValueError: `tuned.json` is damaged.
    """
    key = (tuple(capability), element_bytes, head_dim, kernel)
    wide = _read().get((*key, 128, format, part)) if block_keys == 128 else None
    entry = wide or _read().get((*key, 64, format, part))
    return None if entry is None else entry.launch


def fastest_kernel(
    capability: tuple[int, int],
    element_bytes: int,
    head_dim: int,
    block_keys: int = 64,
    format: str = "none",
    part: str = "forward",
) -> str:
    """The kernel measured to be the fastest for these: the one with pointers where none was.

    Raises:
        ValueError: `tuned.json` is damaged.
    """
    keys = 128 if block_keys == 128 and part == "forward" else 64
    here = tuple(capability), element_bytes, head_dim
    found = [_read().get((*here, name, keys, format, part)) for name in KERNELS]
    known = [entry for entry in found if entry is not None]
    return max(known, key=lambda entry: entry.gain).kernel if known else "pointer"


def time_on_wide_blocks(capability: tuple[int, int]) -> float | None:
    """The time of a pair in blocks of 128 keys to that in blocks of 64, each by its fastest kernel.

    In 16 bits with head_dim 128, as large models have; None where that was not measured.

    Raises:
        ValueError: `tuned.json` is damaged.
    """
    best = {
        keys: max(
            (
                entry.gain
                for (seen, size, dim, _, *of_masks), entry in _read().items()
                if (seen, size, dim, *of_masks) == (tuple(capability), 2, 128, keys, "none", "forward")
            ),
            default=None,
        )
        for keys in (64, 128)
    }
    return best[64] / best[128] if best[64] and best[128] else None
