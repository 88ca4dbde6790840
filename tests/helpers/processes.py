"""Runs a module of this folder in several processes that know of each other by gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run(module: str, folder: Path, count: int, *arguments: str) -> list[dict[str, Any]]:
    """What each of `count` processes wrote: `python MODULE.py RANK COUNT FOLDER ...` to FOLDER/RANK.json."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(Path(__file__).parent / f"{module}.py")]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(count), str(folder), *arguments],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    said = [process.communicate()[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(said)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]
