"""Runs a program in several processes that know of each other by gloo."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import forks


def run(module: str, folder: Path, count: int, *arguments: str) -> list[dict[str, Any]]:
    """What each of `count` processes wrote: `python MODULE.py RANK COUNT FOLDER ...` to FOLDER/RANK.json.

    MODULE.py is in this folder.
    """
    path = forks.HERE / f"{module}.py"
    done = forks.run([[path, rank, count, folder, *arguments] for rank in range(count)], folder)
    assert not any(one.returncode for one in done), "\n".join(one.stderr for one in done)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def launch(folder: Path, *arguments: Any, count: int = 2) -> list[forks.Done]:
    """`accelerate launch --multi_gpu --num_processes COUNT` of `arguments`, without a process to launch them.

    It tells its processes by these variables of each other.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    ranks = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)} for rank in range(count)
    ]
    done = forks.run([arguments] * count, folder, [where | rank for rank in ranks])
    assert not any(one.returncode for one in done), "\n".join(one.stderr for one in done)
    return done
