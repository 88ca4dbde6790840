"""Speed tables: what was measured of attention on a machine. One comes with the library, users make theirs.

The library's are made of the benchmarks' results by `python -m dit_accel.evals.benchmarks.speed_tables`, a
user's by `dit-accel bench --calibrate`, which puts it into the cache folder, one file for each machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dit_accel.cache_folder import user_cache_folder
from dit_accel.environment import instruction_set, processor
from dit_accel.json_files import read_json, write_json

SCHEMA = "dit-accel/speed-table/1"
SHIPPED = Path(__file__).parent / "speed_tables"


@dataclass(frozen=True)
class Machine:
    """What speeds depend on.

    Attributes:
        device: device type, `"cpu"` or `"cuda"`.
        name: of the processor or GPU.
        threads: that PyTorch computes with; 0 for a GPU.
        torch: its version.
        instructions: the widest instruction set of a CPU, such as `"AMX"`; empty where it was not recorded.
    """

    device: str
    name: str
    threads: int
    torch: str
    instructions: str = ""

    def __str__(self) -> str:
        threads = f"{self.threads} threads" if self.threads else ""
        return ", ".join(filter(None, (self.name, threads, self.instructions, f"torch {self.torch}")))

    def is_like(self, other: Machine) -> bool:
        """Whether speeds of one hold for the other; versions of PyTorch may differ."""
        same = (self.device, self.name, self.threads) == (other.device, other.name, other.threads)
        recorded = self.instructions and other.instructions
        return same and (not recorded or self.instructions == other.instructions)


def this_machine(device: str) -> Machine | None:
    """This machine, with its first GPU for `"cuda"`; None where it has no such device."""
    import torch

    if device == "cpu":
        return Machine(device, processor(), torch.get_num_threads(), torch.__version__, instruction_set())
    if device != "cuda" or not torch.cuda.is_available():
        return None
    return Machine(device, torch.cuda.get_device_name(0), 0, torch.__version__)


@dataclass(frozen=True)
class AttentionCase:
    """Block-sparse attention against dense: `efficiency` is speed-up x block density of one call."""

    dtype: str
    head_dim: int
    heads: int
    tokens: int
    block_density: float
    efficiency: float

    @property
    def pairs(self) -> float:
        """Computed pairs: heads x queries x keys x block density."""
        return self.block_density * self.heads * self.tokens**2


@dataclass(frozen=True)
class QuantizedCase:
    """Block-sparse attention in a numeric format: how many times as fast as without one, on the same mask."""

    dtype: str
    head_dim: int
    quantization: str
    tokens: int
    block_density: float
    gain: float


@dataclass(frozen=True)
class BreakEven:
    """At this density sparse attention is faster from this number of `tokens` on."""

    dtype: str
    head_dim: int
    density: float
    tokens: float


@dataclass(frozen=True)
class RestOfStep:
    """FLOP/s of everything but attention in a step of a model, relative to that of dense attention."""

    model: str
    dtype: str
    rate: float


@dataclass(frozen=True)
class SpeedTable:
    """All that was measured on one machine; `calibrated` where the user measured it on this one."""

    machine: Machine
    attention: tuple[AttentionCase, ...] = ()
    break_even: tuple[BreakEven, ...] = ()
    rest_of_step: tuple[RestOfStep, ...] = ()
    quantized: tuple[QuantizedCase, ...] = ()
    calibrated: bool = False

    def write(self, path: Path) -> None:
        """Writes it as JSON, whole or not at all."""
        write_json(path, {"schema": SCHEMA, **self.to_dict()})

    def to_dict(self) -> dict[str, Any]:
        """Everything but `calibrated`, which depends on where the file is, as plain data."""
        data = dataclasses.asdict(self)
        del data["calibrated"]
        return data

    @classmethod
    def read(cls, path: Path) -> SpeedTable:
        """The table in a file.

        Raises:
            ValueError: a file that is no such table, naming it, the reason and the remedy.
        """
        try:
            data = read_json(path, "a speed table")
            if not isinstance(data, dict) or data.get("schema") != SCHEMA:
                raise ValueError(f"its `schema` is not {SCHEMA!r}")
            rows = {name: data.get(name, []) for name in _ROWS}
            machine = _checked(Machine, data.get("machine"))
            return cls(machine, *(tuple(_checked(kind, row) for row in rows[n]) for n, kind in _ROWS.items()))
        except (ValueError, TypeError) as error:
            remedy = "delete it, or measure anew with `dit-accel bench --calibrate`"
            raise ValueError(f"{path} is not a speed table: {error}; {remedy}") from None


_ROWS = {
    "attention": AttentionCase,
    "break_even": BreakEven,
    "rest_of_step": RestOfStep,
    "quantized": QuantizedCase,
}


def _checked(kind: type, row: Any) -> Any:
    """A row of a table as a `kind`, of positive numbers that are not absurd, densities at most 1."""
    if not isinstance(row, dict) or set(row) != {field.name for field in dataclasses.fields(kind)}:
        raise ValueError(f"{str(row)[:80]} must have the keys of {kind.__name__}")
    for field in dataclasses.fields(kind):
        value = row[field.name]
        wanted = {"str": str, "int": int, "float": (int, float)}[field.type]
        good = isinstance(value, wanted) and not isinstance(value, bool)
        if good and wanted is not str:
            least, most = 0 if field.name == "threads" else 1e-9, 1 if "density" in field.name else 1e15
            good = least <= value <= most  # which NaN is not
        if not good:
            raise ValueError(f"`{field.name}` of {kind.__name__} cannot be {str(value)[:80]!r}")
    return kind(**row)


def calibrated_path(machine: Machine) -> Path:
    """Where the user's table of a machine is, or would be."""
    key = f"{machine.name}|{machine.threads}|{machine.instructions}".encode()
    name = f"{machine.device}-{hashlib.sha256(key).hexdigest()[:12]}.json"
    return user_cache_folder() / "dit-accel" / "speed" / name


def speed_tables(device: str) -> list[SpeedTable]:
    """What is known of a device type, the user's table of this machine before that of the library.

    Raises:
        ValueError: a file that is no speed table.
    """
    here = this_machine(device)
    own, shipped = here and calibrated_path(here), SHIPPED / f"{device}.json"
    tables = []
    if own and own.is_file():
        tables.append(dataclasses.replace(_read_once(own, own.stat().st_mtime_ns), calibrated=True))
    if shipped.is_file():
        tables.append(_read_once(shipped, shipped.stat().st_mtime_ns))
    return tables


@lru_cache(maxsize=16)
def _read_once(path: Path, changed: int) -> SpeedTable:
    return SpeedTable.read(path)
