"""Visitors of the demo for a while: they generate, cancel, explore and leave; what it cost and what was lost.

`python -m dit_accel.evals.demo_soak --minutes 20` starts `dit-accel demo` as a user would, on loopback alone,
with four sessions by default. It fails where an answer was wrong or missing, memory grew after the first five
minutes or a file stayed; whether memory grew is said of runs of ten minutes and more.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dit_accel.json_files import write_json

SCHEMA = "dit-accel/soak/1"
MODELS = ("tiny-flux", "tiny-sd3")
PATIENCE = 600  # seconds for one answer, on a machine that does much else
HOW = {"verbose": False, "download_files": False, "httpx_kwargs": {"timeout": PATIENCE}}
WARM_UP = 300  # seconds in which models, caches of masks and threads come: then memory was level
GROWTH = 1.05  # of memory from the warm-up to the end, by a fit
FITTED = 300  # samples at most: all pairs of them are compared
MIB = 2**20
CLEAR = "attention: {{pattern: Clear, radius: {radius}}}\n"


class Visitor(threading.Thread):
    """One session that does one thing after another until it is time to go.

    Attributes:
        done: how many of each were answered as they should be.
        visits: how often it came.
        wrong: what was not.
    """

    def __init__(self, address: str, seed: int, until: float):
        super().__init__(daemon=True)
        self.address, self.until = address, until
        self.rng = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.seconds: dict[str, list[float]] = {}
        self.visits = 0

    def run(self) -> None:
        from gradio_client import Client  # pyright: ignore[reportMissingImports]

        deeds: list[Callable[[Any], None]] = [self.generate, self.compare, self.cancel, self.mask, self.mask]
        client, age = None, 0
        while time.monotonic() < self.until:
            if client is None or age == 12:  # some visitors leave, and others come
                if client is not None:
                    client.close()
                client, age = Client(self.address, **HOW), 0
                self.visits += 1
            deed, age = self.rng.choice(deeds), age + 1
            start = time.monotonic()
            try:
                deed(client)
            except Exception as error:
                self.wrong.append(f"{deed.__name__}: {type(error).__name__}: {error!s:.300}")
            else:
                self.done[deed.__name__] += 1
                self.seconds.setdefault(deed.__name__, []).append(time.monotonic() - start)
        if client is not None:
            client.close()

    def _arguments(self, steps: int = 2) -> tuple:
        recipe = CLEAR.format(radius=self.rng.randint(2, 5))
        model = self.rng.choices(MODELS, (9, 1))[0]
        return (model, "a soak", recipe, 64, 64, None, steps, 4.0, self.rng.randrange(1000))

    def generate(self, client: Any) -> None:
        """One picture."""
        job = client.submit(*self._arguments(), api_name="/generate")
        single, _, figures, *texts = job.result(timeout=PATIENCE)
        self._check(len(figures) == 1 and all(texts), "figures or exports are missing")
        self._check_picture(single)

    def compare(self, client: Any) -> None:
        """A pair of pictures."""
        job = client.submit(*self._arguments(), api_name="/compare")
        pair, _, figures, *texts = job.result(timeout=PATIENCE)
        self._check(len(pair) == len(figures) == 2 and all(texts), "figures or exports are missing")
        for picture in pair:
            self._check_picture(picture)

    def cancel(self, client: Any) -> None:
        """A long run, given up after a moment: it ends as cancelled, or had not begun."""
        job = client.submit(*self._arguments(steps=100), api_name="/generate")
        until = time.monotonic() + PATIENCE
        while not job.done():
            time.sleep(self.rng.uniform(0.5, 2))
            client.predict(api_name="/cancel")  # of a run that waits its turn, as soon as it has begun
            self._check(time.monotonic() < until, "a run could not be cancelled")
        error = job.exception()
        self._check(error is None or "stopped" in str(error), f"not cancelled but {error!r}")

    def mask(self, client: Any) -> None:
        """A pattern on a grid."""
        side, radius = self.rng.choice((24, 32, 48, 64)), self.rng.randint(3, 12)
        job = client.submit("Clear", f"radius: {radius}", 1, side, side, 64, "64x32", api_name="/mask")
        *pictures, summary, recipe, python, command = job.result(timeout=PATIENCE)
        self._check(len(pictures) == 4 and 0 < summary["density"] < 1, "pictures or figures are missing")
        self._check(bool(recipe and python and command), "exports are missing")
        for picture in pictures:
            self._check_picture(picture)

    def _check_picture(self, part: Any) -> None:
        from PIL import Image

        path = part["path"] if isinstance(part, dict) else part
        with urllib.request.urlopen(f"{self.address}gradio_api/file={quote(path)}", timeout=PATIENCE) as file:
            Image.open(io.BytesIO(file.read())).load()

    def _check(self, fine: bool, otherwise: str) -> None:
        if not fine:
            raise AssertionError(otherwise)


def memory(process: int) -> int:
    """Resident bytes of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def soak(minutes: float, sessions: int, seed: int = 0) -> dict[str, Any]:
    """Runs it; see the module docstring."""
    root = Path(tempfile.mkdtemp(prefix="soak-"))
    models = [word for name in MODELS for word in ("--model", name)]
    command = [sys.executable, "-m", "dit_accel", "demo", "--host", "127.0.0.1", *models, "--device", "cpu"]
    log = (root.parent / f"{root.name}.log").open("w+")
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, "TMPDIR": str(root)}
    )
    start = time.monotonic()
    try:
        line = server.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", line)
        if address is None:
            raise RuntimeError(f"the demo did not start: {line!r}")
        ready = time.monotonic() - start
        until = time.monotonic() + 60 * minutes
        visitors = [Visitor(f"{address[0]}/", seed + i, until) for i in range(sessions)]
        for visitor in visitors:
            visitor.start()
        samples: list[tuple[float, int]] = []
        while any(visitor.is_alive() for visitor in visitors):
            samples.append((time.monotonic() - start, memory(server.pid)))
            time.sleep(5)
            if time.monotonic() > until + PATIENCE:
                break
        hung = sum(visitor.is_alive() for visitor in visitors)
        files = sum(1 for path in root.rglob("*") if path.is_file())
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(120)
    log.seek(0)
    tracebacks = log.read().count("Traceback")
    log.close()
    left = sorted(str(path.relative_to(root)) for path in root.glob("dit-accel-demo-*"))
    shutil.rmtree(root, ignore_errors=True)
    done = sum((visitor.done for visitor in visitors), Counter())
    seconds = {
        name: statistics.median(s for visitor in visitors for s in visitor.seconds.get(name, ()))
        for name in sorted(done)
    }
    return {
        "schema": SCHEMA,
        "minutes": minutes,
        "sessions": sessions,
        "ready_seconds": ready,
        "visits": sum(visitor.visits for visitor in visitors),
        "answered": dict(done),
        "median_seconds": seconds,
        "wrong": [line for visitor in visitors for line in visitor.wrong],
        "hung": hung,
        "server_tracebacks": tracebacks,
        "exit_code": code,
        "files_while_running": files,
        "folders_left": left,
        "memory_mib": [[round(t), round(b / MIB)] for t, b in samples],
        "growth": growth(samples),
    }


def growth(samples: Sequence[tuple[float, int]]) -> float | None:
    """Memory at the end over memory after the warm-up, on a straight line through what lies between.

    The line's slope is the median of those between all pairs of samples (Theil and Sen): a run that happens
    to be under way at the end raises no more than its own samples, where a leak raises all later ones.

    Args:
        samples: (seconds since the start, bytes), evenly spaced.

    Returns:
        the ratio; None where no more than the warm-up's length lies behind it.
    """
    settled = [(t, size) for t, size in samples if t >= WARM_UP]
    settled = settled[:: len(settled) // FITTED + 1]
    if len(settled) < 2 or settled[-1][0] - settled[0][0] < WARM_UP:
        return None
    slope = statistics.median((b - a) / (s - t) for (t, a), (s, b) in combinations(settled, 2))
    middle = statistics.median(size for _, size in settled)
    rise = slope * (settled[-1][0] - settled[0][0])
    return (middle + rise / 2) / (middle - rise / 2)


def faults(answer: dict[str, Any]) -> list[str]:
    """What was not as promised."""
    found = list(answer["wrong"])
    found += ["nothing was answered"] if not answer["answered"] else []
    found += [f"{answer['hung']} sessions hung"] if answer["hung"] else []
    found += [f"the server logged {n} errors"] if (n := answer["server_tracebacks"]) else []
    found += [f"folders left: {answer['folders_left']}"] if answer["folders_left"] else []
    grown = answer["growth"]
    found += [f"memory grew {grown:.3f} times"] if grown is not None and grown > GROWTH else []
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--sessions", type=int, default=4)
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    given = parser.parse_args()
    if not 0 < given.minutes <= 240 or not 1 <= given.sessions <= 16:
        parser.error("--minutes must be above 0 and at most 240, --sessions from 1 to 16")
    answer = soak(given.minutes, given.sessions)
    if given.out:
        write_json(given.out, answer)
    first, last = answer["memory_mib"][0][1], answer["memory_mib"][-1][1]
    print(
        f"{given.sessions} sessions, {given.minutes:g} minutes, ready after {answer['ready_seconds']:.1f} s"
    )
    print(f"visits: {answer['visits']}")
    for name, count in answer["answered"].items():
        print(f"{name}: {count}, median {answer['median_seconds'][name]:.2f} s")
    grown = "not known: too short" if answer["growth"] is None else f"{answer['growth']:.3f}"
    print(f"memory: {first} MiB at the start, {last} at the end; growth after the warm-up {grown}")
    print(f"files while it ran: {answer['files_while_running']}, folders left: {len(answer['folders_left'])}")
    for fault in (wrong := faults(answer)):
        print(f"FAULT: {fault}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
