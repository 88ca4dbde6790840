"""Shared libraries of C++ code, compiled for this processor at first use and kept in a cache folder.

Triton and `torch.compile` likewise need a compiler where they run; nothing is compiled at installation. What
is kept gets loaded into the process, so only the user may be able to write it: folder and files must be the
user's own. A record beside each library has its size and SHA-256; what does not match is compiled again. No
compiler is asked whether a library is the right one: its name stands for source, flags and processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dit_accel.cache_folder import user_cache_folder
from dit_accel.errors import UnavailableError

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=fast")

# what /proc/cpuinfo says of a processor's kind and instructions, on x86, Arm, RISC-V and POWER
_KIND = {"vendor_id", "cpu family", "model", "model name", "stepping", "flags", "features", "isa", "cpu"}
_KIND |= {"cpu implementer", "cpu architecture", "cpu variant", "cpu part", "cpu revision", "revision"}

_log = logging.getLogger("dit_accel")


def load(source: Path, functions: Sequence[str]) -> ctypes.CDLL:
    """The library of a C++ file with these functions, from the cache folder or compiled into it.

    Raises:
        UnavailableError: there is none and none can be made; the message says why.
    """
    try:
        folder = private_folder()
    except (OSError, RuntimeError) as error:  # a RuntimeError: there is no home folder
        raise UnavailableError(_not_kept(source, error)) from error
    stem, problem = f"{source.stem}-{_fingerprint(source)}", None
    if (folder / f"{stem}.json").exists():
        try:
            return _opened(_kept(folder, stem), functions)
        except (OSError, ValueError) as error:
            problem = f"{source.stem} cannot use what is kept in {folder}: {error}"
            _log.info("%s; compiling it again", problem)
    return _made(source, folder, stem, functions, problem)


# -- folder --------------------------------------------------------------------------------------------------


def private_folder() -> Path:
    """The folder `dit_accel` in the user's cache folder, which nobody else can write.

    Raises:
        OSError: it cannot be made, or somebody else owns it or can write it.
        RuntimeError: the user has no home folder.
    """
    folder = user_cache_folder() / "dit_accel"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = _private_mode(folder, stat.S_ISDIR)
    if mode != 0o700 and os.access(folder, os.W_OK):
        folder.chmod(0o700)
    return folder


def _private_mode(path: Path, is_kind: Callable[[int], bool]) -> int:
    """The permissions of a folder or file of the user's own.

    Raises:
        PermissionError: it is a link or something else, or somebody else owns it or can write it.
    """
    status = path.lstat()
    mode = stat.S_IMODE(status.st_mode)
    if not is_kind(status.st_mode):
        raise PermissionError(f"{path} is a symbolic link or of another wrong kind")
    if os.name == "posix" and status.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to user {status.st_uid}, not to {os.geteuid()}")
    if os.name == "posix" and mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others can write {path} (mode {mode:o}); see what is in it, then `chmod 700`")
    return mode


def _read(path: Path) -> bytes:
    """The contents of a file of the user's own."""
    _private_mode(path, stat.S_ISREG)
    return path.read_bytes()


def _write(path: Path, data: bytes, partial: Path) -> None:
    """Write a file so that others, and this machine after a crash, see all of it or nothing."""
    made = partial / path.name
    with made.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    made.chmod(0o700)
    made.replace(path)


# -- what is kept --------------------------------------------------------------------------------------------


def _fingerprint(source: Path) -> str:
    """Names what is compiled, with the files beside it that it includes, how, and what for."""
    code = source.read_bytes()
    included = (source.with_name(name.decode()) for name in re.findall(rb'(?m)^#include "(.+)"', code))
    parts = (code, *(path.read_bytes() for path in included), " ".join(FLAGS).encode(), processor().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def processor() -> str:
    """The kind of processor and system that code is compiled for, or this machine's name where unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    pairs = (line.partition(":") for line in lines)
    kind = sorted({f"{key.strip()}:{value}" for key, _, value in pairs if key.strip().lower() in _KIND})
    system = (platform.system(), platform.machine(), *platform.libc_ver())
    return "\n".join([*system, *(kind or [platform.node()])])


def _kept(folder: Path, stem: str) -> Path:
    """The library that the record of this name is about.

    Its own name has its SHA-256, because a system that has loaded a file does not load another of that name.

    Raises:
        OSError: it cannot be read, or is not the user's own.
        ValueError: it, or the record, is damaged.
    """
    record = json.loads(_read(folder / f"{stem}.json"))
    if not isinstance(record, dict) or not {"size", "sha256"} <= record.keys():
        raise ValueError(f"{stem}.json is not a record of a library")
    path = folder / f"{stem}-{str(record['sha256'])[:16]}.so"
    data = _read(path)
    if (len(data), hashlib.sha256(data).hexdigest()) != (record["size"], record["sha256"]):
        raise ValueError(f"{path.name} is not what was compiled, by its size or SHA-256")
    return path


def _opened(path: Path, functions: Sequence[str]) -> ctypes.CDLL:
    """The library, loaded.

    Raises:
        OSError: it cannot be.
        ValueError: it lacks a function.
    """
    library = ctypes.CDLL(str(path))
    missing = [name for name in functions if not hasattr(library, name)]
    if missing:
        raise ValueError(f"{path.name} has no function {', '.join(missing)}")
    return library


# -- compilation ---------------------------------------------------------------------------------------------


def _made(
    source: Path, folder: Path, stem: str, functions: Sequence[str], problem: str | None
) -> ctypes.CDLL:
    """The library from the first compiler that makes one."""
    names = (os.environ.get("CXX", "g++"), "g++", "clang++", "c++")
    reasons = [problem] if problem else []
    compilers = list(dict.fromkeys(filter(None, map(shutil.which, names))))
    if not compilers:
        reasons.append(f"{source.stem} compiles C++ and no compiler was found; install g++ or clang++")
    for compiler in compilers:
        try:
            return _opened(_compiled(compiler, source, folder, stem), functions)
        except subprocess.CalledProcessError as error:
            reasons.append(
                f"{source.stem} could not be compiled: `{compiler}` says {error.stderr.strip()[-500:]}"
            )
        except ValueError as error:
            reasons.append(f"{source.stem}, compiled by `{compiler}`, cannot be used: {error}")
        except OSError as error:
            reasons.append(_not_kept(source, error))
    raise UnavailableError("; ".join(dict.fromkeys(reasons)))


def _not_kept(source: Path, error: Exception) -> str:
    return f"{source.stem} could not be kept or loaded ({error}); set XDG_CACHE_HOME to a folder for it"


def _compiled(compiler: str, source: Path, folder: Path, stem: str) -> Path:
    """The library, compiled into the folder, and its record."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        made = Path(partial) / "library.so"
        command = [compiler, *FLAGS, str(source), "-o", str(made)]
        subprocess.run(command, capture_output=True, text=True, check=True)
        data = made.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        path = folder / f"{stem}-{digest[:16]}.so"
        record = {"size": len(data), "sha256": digest, "compiler": compiler}
        _write(path, data, Path(partial))
        _write(folder / f"{stem}.json", json.dumps(record).encode(), Path(partial))
    _log.info("compiled %s for this CPU in %.1f s: %s", source.name, time.perf_counter() - start, path)
    return path
