"""Python processes that start at once: forks of one that has imported torch, diffusers and the helpers.

To import them takes ten seconds of a processor in every process. Run as a program it is the process that is
forked: it reads lines of JSON, lists of programs to start together, and answers each with their exit codes.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import subprocess
import sys
import traceback
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
ONE_MACHINE = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(
    programs: list[list[Any]], folder: Path, environments: list[dict[str, str]] | None = None
) -> list[Done]:
    """What became of programs that run at the same time.

    Args:
        programs: the arguments of each after `python`: a file's path or `-m` and a module's name come first.
        folder: where what they say is kept.
        environments: what each has in its environment beside this process's.
    """
    said = [
        [str(folder / f"{number}.{stream}") for stream in ("out", "err")] for number in range(len(programs))
    ]
    asked = [
        {
            "arguments": list(map(str, arguments)),
            "environment": {**os.environ, **ONE_MACHINE, **(environments[number] if environments else {})},
            "folder": os.getcwd(),
            "said": said[number],
        }
        for number, arguments in enumerate(programs)
    ]
    server = _server()
    server.stdin.write(json.dumps(asked) + "\n")
    server.stdin.flush()
    codes = json.loads(server.stdout.readline())
    return [
        Done(code, *(Path(path).read_text() for path in paths))
        for code, paths in zip(codes, said, strict=True)
    ]


@cache
def _server() -> subprocess.Popen:
    """It ends when this process does, whose pipe it reads."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, __file__], env=os.environ | ONE_MACHINE, **pipes)


def _serve() -> None:
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import tiny_families  # noqa: F401
    import torch
    from diffusers import FluxPipeline, WanPipeline  # noqa: F401

    import dit_accel  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()
    for line in sys.stdin:
        children = [_started(**program) for program in json.loads(line)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


def _started(arguments: list[str], environment: dict[str, str], folder: str, said: list[str]) -> int:
    """The process that runs a program as `python` would."""
    if child := os.fork():
        return child
    code: Any = 1
    try:
        for number, path in enumerate([os.devnull, *said]):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        os.environ.update(environment)
        os.chdir(folder)
        if arguments[0] == "-m":
            sys.path[0], sys.argv[:] = folder, arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[0], sys.argv[:] = str(Path(arguments[0]).parent), arguments
            runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
