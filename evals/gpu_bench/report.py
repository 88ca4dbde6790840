"""What a run measured, as lines while it goes on, as rows of the project's CSV, and as a page at its end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from dit_accel.kernels.block_sparse.tuned import Entry, Launch

from ..benchmarks.table import machine, markdown
from ..benchmarks.table import row as csv_row
from .cases import BY_NAME
from .job import Row
from .launches import describe


def line(measured: Row) -> str:
    """A row in words."""
    kind, name = measured["kind"], measured.get("job", "")
    if kind == "machine":
        return f"on {on_what(measured)}"
    if kind == "check":
        what = f"head_dim {measured['head_dim']} {measured['dtype']} {measured['geometry']}"
        verdict = "right" if measured["right"] else "WRONG"
        repeats = "" if measured["repeats"] else ", not the same twice"
        return f"{name}, {what}: {verdict}, {measured['error']:.2f} of what is allowed{repeats}"
    if kind in ("left out", "wrong"):
        recipe = f", {measured['recipe']}" if "recipe" in measured else ""
        return f"{name}{recipe}: {kind.upper()}, {measured['reason']}"
    if kind == "step":
        return f"{name}, {measured['recipe'] or 'dense'}: {measured['ms']:.1f} ms"
    if "ms" in measured:
        return f"{name}: {measured['ms']:.3f} ms, {measured['tflops']:.3g} TFLOP/s"
    return f"{name}: {measured.get('file') or measured.get('what')}"


def on_what(measured: Row) -> str:
    """The machine and the versions of a run."""
    here = measured["environment"]
    packages = here["packages"]
    device = "cuda" if here["gpus"] else "cpu"
    versions = f"torch {packages['torch']}, triton {packages['triton']}, CUDA {here['cuda']}"
    return f"{machine(here, device)}, {versions}, commit {here['commit']}"


def is_wrong(measured: Row) -> bool:
    """Whether it says that a kernel is wrong."""
    return measured["kind"] == "wrong" or (measured["kind"] == "check" and not measured["right"])


class Yardsticks:
    """The fastest exact dense attention on each case so far, to which speed-ups are taken."""

    def __init__(self) -> None:
        self._ms: dict[tuple, float] = {}

    def see(self, measured: Row) -> None:
        if measured["kind"] == "time" and measured["exact"] and not measured["sparse"]:
            case = tuple(measured["case"])
            self._ms[case] = min(measured["ms"], self._ms.get(case, measured["ms"]))

    def speedup(self, measured: Row) -> float | None:
        """Times faster than dense attention; None where that was not measured."""
        dense = self._ms.get(tuple(measured["case"]))
        return None if dense is None else dense / measured["ms"]


def csv_rows(measured: Row, yardsticks: Yardsticks, here: dict, device: str) -> Iterator[dict[str, str]]:
    """Rows of `bench_<device>.csv`. Plans read `efficiency`, speed-up x block density: that of ours alone."""
    write = partial(csv_row, here=here, device=device)
    if measured["kind"] == "step":
        shape = f"{measured['step']} {measured['recipe'] or ''} {measured['dtype']}".replace("  ", " ")
        provider = "auto" if measured["recipe"] else "dense"
        yield write("step", provider, "ms", shape, _quantiles(measured))
        for metric in ("density", "block_density") if measured["recipe"] else ():
            yield write("step", provider, metric, shape, measured[metric])
    if measured["kind"] not in ("time", "backward"):
        return
    case, provider = BY_NAME[tuple(measured["case"])], measured["provider"]
    shape = f"B1-H{case.heads}-N{case.layout.seq_len}-D{case.head_dim}-{measured['dtype']} {case.title}"
    if measured["kind"] == "backward":
        yield write("block_sparse_backward", provider, "ms", shape, _quantiles(measured))
        yield write("block_sparse_backward", provider, "tflops", shape, measured["tflops"])
        return
    yield write("block_sparse", provider, "ms", shape, _quantiles(measured))
    yield write("block_sparse", provider, "tflops", shape, measured["tflops"])
    if measured["sparse"]:
        for metric in ("density", "block_density"):
            yield write("block_sparse", provider, metric, shape, measured[metric])
    if (speedup := yardsticks.speedup(measured)) is not None:
        yield write("block_sparse", provider, "speedup", shape, speedup)
        if measured["ours"] and measured["exact"]:
            yield write("block_sparse", provider, "efficiency", shape, speedup * measured["block_density"])


def _quantiles(measured: Row) -> tuple[float, float, float]:
    return measured["p20"], measured["ms"], measured["p80"]


# -- page ----------------------------------------------------------------------------------------------------


def page(rows: list[Row], entries: list[Entry], device: str) -> str:
    """The results of a run as Markdown."""
    of = {kind: [row for row in rows if row["kind"] == kind] for kind in {row["kind"] for row in rows}}
    here = on_what(of["machine"][0]) if "machine" in of else "an unknown machine"
    checks, bad = of.get("check", []), [row for row in rows if is_wrong(row)]
    title, remark = "Block-sparse attention on a GPU", "medians of the device's time with a cold L2 cache"
    if device == "cpu":
        title, remark = "Rehearsal without a GPU", "nothing here is a measurement"
    parts = [
        f"# {title}\n\n{here}; {remark}. TFLOP/s are of the pairs computed, those of whole blocks. Written "
        "by `python -m dit_accel.evals.gpu_bench`.\n",
        f"{len(checks)} checks against float64, {sum(map(is_wrong, checks))} wrong.\n",
    ]
    if bad:
        parts.append("Wrong:\n\n" + _list(map(line, bad)))
    if "time" in of:
        parts.append("## Attention\n\n" + _attention_table(of["time"], of.get("matmul", [])))
    if "backward" in of:
        parts.append("## Backward pass\n\n" + _backward_table(of["backward"], of.get("time", [])))
    if "step" in of:
        parts.append("## One step, random weights\n\n" + _step_table(of["step"]))
    if "launch" in of:
        parts.append("## Launch configurations\n\n" + _launch_table(of["launch"], entries))
    if "profile" in of:
        parts.append("## Profiles\n\n" + _list(f"{row['tool']}: {row['file']}" for row in of["profile"]))
    if "left out" in of:
        reasons = (line(row).replace("LEFT OUT, ", "") for row in of["left out"])
        parts.append("## Left out\n\n" + _list(reasons))
    return "\n".join(parts)


def _list(lines: Iterable[str]) -> str:
    return "".join(f"- {text}\n" for text in lines)


def _attention_table(times: list[Row], ceiling: list[Row]) -> str:
    yardsticks = Yardsticks()
    for measured in times:
        yardsticks.see(measured)
    headings = ("shape", "pattern", "block density", "provider", "ms", "TFLOP/s", "speed-up", "efficiency")
    cells = [
        [f"{size} x {size}", "matrix product", "", "torch.mm", f"{r['ms']:.3f}", f"{r['tflops']:.3g}", "", ""]
        for r in ceiling for size in [r["size"]]
    ]  # fmt: skip
    for measured in times:
        case, speedup = BY_NAME[tuple(measured["case"])], yardsticks.speedup(measured)
        share = measured["block_density"] if measured["sparse"] else 1.0
        cells.append([
            case.name, case.pattern_name if measured["sparse"] else "all pairs", f"{share:.4f}",
            measured["provider"], f"{measured['ms']:.3f}", f"{measured['tflops']:.3g}",
            "" if speedup is None else f"{speedup:.2f}", "" if speedup is None else f"{speedup * share:.2f}",
        ])  # fmt: skip
    return markdown(headings, cells)


def _backward_table(rows: list[Row], times: list[Row]) -> str:
    forward = {(*row["case"], row["provider"]): row["ms"] for row in times}
    headings = ("shape", "pattern", "block density", "provider", "ms", "TFLOP/s", "times its forward")
    cells = []
    for row in rows:
        case, own = BY_NAME[tuple(row["case"])], forward.get((*row["case"], row["provider"]))
        cells.append([
            case.name, case.pattern_name if row["sparse"] else "all pairs",
            f"{row['block_density'] if row['sparse'] else 1.0:.4f}", row["provider"], f"{row['ms']:.3f}",
            f"{row['tflops']:.3g}", "" if own is None else f"{row['ms'] / own:.2f}",
        ])  # fmt: skip
    return markdown(headings, cells)


def _step_table(steps: list[Row]) -> str:
    dense = {row["step"]: row["ms"] for row in steps if row["recipe"] is None}
    headings = ("model", "recipe", "density", "block density", "dense ms", "sparse ms", "speed-up")
    cells = [
        [row["step"], row["recipe"], f"{row['density']:.4f}", f"{row['block_density']:.4f}",
         f"{dense[row['step']]:.1f}", f"{row['ms']:.1f}", f"{dense[row['step']] / row['ms']:.2f}"]
        for row in steps if row["recipe"] is not None
    ]  # fmt: skip
    return markdown(headings, cells)


def _launch_table(rows: list[Row], entries: list[Entry]) -> str:
    chosen = {(entry.head_dim, entry.launch) for entry in entries}
    headings = ("shape", "pattern", "head_dim", "launch", "ms", "TFLOP/s", "chosen")
    cells = []
    for row in sorted(rows, key=lambda row: (row["head_dim"], row["case"], row["ms"])):
        case, launch = BY_NAME[tuple(row["case"])], Launch(*row["launch"])
        cells.append([
            case.name, case.pattern_name, str(row["head_dim"]), describe(launch), f"{row['ms']:.3f}",
            f"{row['tflops']:.3g}", "yes" if (row["head_dim"], launch) in chosen else "",
        ])  # fmt: skip
    return markdown(headings, cells)


def right_launches(rows: Iterable[Row]) -> dict[int, list[Launch]]:
    """By head_dim, the launches all of whose checks were right."""
    seen: dict[tuple[int, Launch], bool] = {}
    for row in rows:
        if row["kind"] == "check" and row["launch"] is not None:
            key = row["head_dim"], Launch(*row["launch"])
            seen[key] = seen.get(key, True) and row["right"]
    found: dict[int, list[Launch]] = {}
    for (head_dim, launch), right in seen.items():
        if right:
            found.setdefault(head_dim, []).append(launch)
    return found
