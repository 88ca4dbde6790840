"""`dit-accel eval vbench`: videos for VBench, what is missing of them, its dimensions and its scores."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit_accel.errors import UnavailableError
from dit_accel.json_files import write_json

from . import results as res
from . import vbench_generate
from . import vbench_options as vb
from .errors import reported
from .option_groups import Judging, grouped
from .options import check_output, pick_device
from .output import JsonOption, note, print_json, print_table

if TYPE_CHECKING:
    from dit_accel.evals.vbench.suite import Installed, Prompt
    from dit_accel.scorers.pretrained import Sources

PROMPTS_SCHEMA, CHECK_SCHEMA = "dit-accel/vbench-prompts/1", "dit-accel/vbench-check/1"
PROMPTS_EXAMPLE = f"{vb.START} prompts --vbench-python ~/vbench/bin/python --dimensions color"
CHECK_EXAMPLE = f"{vb.START} check --videos videos/ --prompts VBench_full_info.json"
RUN_EXAMPLE = (
    f"{vb.START} run --videos videos/ --dimensions all --vbench-python ~/vbench/bin/python --out a.json"
)
AGGREGATE_EXAMPLE = f"{vb.START} aggregate evaluation_results/ --plot radar.png --out scores.json"

VideosOption = Annotated[Path, typer.Option("--videos", help="Folder of the videos, `{prompt}-{i}.mp4`.")]

commands = typer.Typer(no_args_is_help=True, help="Videos and scores of VBench.")


@commands.command("prompts", epilog=PROMPTS_EXAMPLE)
@reported
def list_prompts(
    prompts: vb.PromptsOption = None,
    vbench_python: vb.PythonOption = None,
    dimensions: vb.DimensionsOption = None,
    json: JsonOption = False,
) -> None:
    """List how many prompts each dimension has, or with --dimensions the prompts themselves."""
    from dit_accel.evals.vbench.suite import T2V, by_dimension

    names = vb.pick_dimensions(dimensions)
    groups = by_dimension(vb.pick_prompts(prompts, vbench_python, names))
    if json:
        rows = {name: [one.text for one in group] for name, group in groups.items()}
        return print_json({"schema": PROMPTS_SCHEMA, "dimensions": rows})
    if names:
        for name, group in groups.items():
            typer.echo("\n".join([f"# {name}", *(one.text for one in group)]))
        return None
    rows = [
        (name or "(none)", len(group), T2V.dimensions[name].prompts if name else None, _videos(group))
        for name, group in groups.items()
    ]
    print_table("", ("dimension", "prompts", "in VBench's suite", "videos"), rows)
    return None


def _videos(prompts: list[Prompt], samples: int | None = None) -> int:
    return sum(len(one.names(samples)) for one in prompts)


@commands.command(epilog=CHECK_EXAMPLE)
@reported
def check(
    videos: VideosOption,
    prompts: vb.PromptsOption = None,
    vbench_python: vb.PythonOption = None,
    dimensions: vb.DimensionsOption = None,
    samples: vb.SamplesOption = None,
    json: JsonOption = False,
) -> None:
    """Count and name the videos that are missing, empty or cut off. Exit code 1 if there are any."""
    from dit_accel.evals.vbench.suite import T2V, by_dimension, find

    chosen = vb.pick_prompts(prompts, vbench_python, vb.pick_dimensions(dimensions))
    found = find(videos, chosen, samples)
    rows = []
    for name, group in by_dimension(chosen).items():
        part = found.of(file for one in group for file in one.names(samples))
        suite = T2V.dimensions[name].prompts if name else None
        counts = (len(part.whole), len(part.missing), len(part.damaged))
        rows.append((name, len(group), suite, _videos(group, samples), *counts))
    columns = ("dimension", "prompts", "suite_prompts", "videos", "whole", "missing", "damaged")
    for line in _foreign(found.foreign):
        note(f"warning: {line}")
    if json:
        answer = {"schema": CHECK_SCHEMA, "videos": videos, "complete": found.complete}
        print_json(
            answer
            | {"dimensions": [dict(zip(columns, row, strict=True)) for row in rows]}
            | {"missing": found.missing, "damaged": found.damaged, "foreign": found.foreign}
        )
    else:
        print_table(str(videos), [name.replace("_", " ") for name in columns], rows)
    if not found.complete:
        raise ValueError(f"of {_videos(chosen, samples)} videos in {videos}, {found.describe()}")


def _foreign(names: tuple[str, ...]) -> list[str]:
    """A warning of files that VBench could take its suffix from."""
    others = [name for name in names if not name.endswith(".mp4")]
    if not others:
        return []
    return [f"VBench looks for the suffix of whatever the folder lists first; move {', '.join(others[:5])}"]


@commands.command(epilog=RUN_EXAMPLE)
@reported
@grouped
def run(
    videos: VideosOption,
    dimensions: Annotated[str, typer.Option("--dimensions", help="Names with commas, or all.")],
    prompts: vb.PromptsOption = None,
    vbench_python: vb.PythonOption = None,
    custom: Annotated[
        bool, typer.Option("--custom", help="Every video in the folder, whatever it is called.")
    ] = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Score the videos that are there.")
    ] = False,
    gpus: Annotated[int, typer.Option("--gpus", min=1, max=1024, help="For vbench to run on.")] = 1,
    output_path: Annotated[
        Path, typer.Option("--output-path", help="Folder for vbench's own results.")
    ] = Path("evaluation_results"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Take over vbench's results that are in --output-path.")
    ] = False,
    *,
    judging: Judging,
) -> None:
    """Score videos in dimensions of VBench: by VBench itself with --vbench-python, else by our own code.

    Our own code has temporal_flickering, and with weights subject_consistency and background_consistency.
    VBench runs as a program in its own environment, a dimension at a time, and fetches its weights itself.
    """
    from dit_accel.evals.vbench.suite import NEED_PROMPTS, Installed

    names = vb.pick_dimensions(dimensions)
    if custom and NEED_PROMPTS & set(names):
        raise typer.BadParameter(f"`--custom` has no {', '.join(sorted(NEED_PROMPTS & set(names)))}")
    if custom and prompts:
        raise typer.BadParameter("`--custom` takes every video, and `--prompts` says which")
    if vbench_python and prompts and prompts.suffix != ".json":
        raise typer.BadParameter(
            "vbench needs its full-info JSON; plain `--prompts` are for our own dimensions"
        )
    tool = Installed.find(vbench_python) if vbench_python else None
    skipped: dict[str, str] = {}
    if tool is None:
        sources = judging.sources()
        names, skipped = _available(names, sources, judging.allow_skipped)
    info = None if custom else prompts or (tool or Installed.find(sys.executable)).full_info
    files, warnings = _files(videos, info, names, allow_missing)
    if tool is None:
        from dit_accel.evals.vbench.dimensions import measure, prepare

        ready = prepare(names, sources, pick_device(judging.device))
        metrics = measure(files, ready, store=judging.store(), track=res.track)
    else:
        metrics = _by_vbench(tool, videos, names, info, output_path, gpus, resume)
    answer = {
        "test": videos,
        "prompts": info,
        "implementation": f"vbench {tool.version or '(version unknown)'}" if tool else "dit-accel",
        "metrics": metrics,
        "skipped": skipped,
        "warnings": warnings,
    }
    judging.give("vbench", answer)


def _available(names: list[str], sources: Sources, allow_skipped: bool) -> tuple[list[str], dict[str, str]]:
    """Splits dimensions into those that our own code can score here, and the others with their reasons.

    Raises:
        UnavailableError: as `metrics.available`.
    """
    from dit_accel.evals.metrics.catalogue import available, of_command

    others = [name for name in names if name not in of_command("vbench")]
    if len(others) == len(names) or (others and not allow_skipped):
        raise UnavailableError(
            f"{', '.join(others)}: only VBench itself has them; give --vbench-python"
            + ("" if len(others) == len(names) else ", or --allow-skipped")
        )
    own, skipped = available([name for name in names if name not in others], sources, allow_skipped)
    return own, skipped | dict.fromkeys(others, "only VBench itself has it: give --vbench-python")


def _files(
    videos: Path, info: Path | None, names: list[str], allow_missing: bool
) -> tuple[dict[str, list[Path]], list[str]]:
    """The videos of each dimension, all of the folder without prompts; and warnings.

    Raises:
        ValueError: missing or damaged videos, or a dimension without any.
    """
    from dit_accel.evals.metrics.folders import Folder
    from dit_accel.evals.vbench.suite import FLICKERING, VIDEOS, by_dimension, find, read_prompts

    if info is None:
        return dict.fromkeys(names, Folder.open(videos).files), []
    chosen = read_prompts(info, names)
    groups, found = by_dimension(chosen), find(videos, chosen, VIDEOS)
    if found.damaged or (found.missing and not allow_missing):
        remedy = "" if found.damaged else " (--allow-missing goes on without)"
        raise ValueError(f"in {videos}, {found.describe()}{remedy}")
    whole = set(found.whole)
    wanted = {name: [file for one in groups.get(name, ()) for file in one.names(VIDEOS)] for name in names}
    files = {name: [videos / file for file in group if file in whole] for name, group in wanted.items()}
    empty = [name for name, group in files.items() if not group]
    if empty:
        raise ValueError(f"there are no videos for {', '.join(empty)} in {videos} by the prompts of {info}")
    warnings = _foreign(found.foreign)
    if found.missing:
        warnings.append(f"scores lack videos: {found.describe()}")
    if any((videos / file).exists() for one in groups.get(FLICKERING, ()) for file in one.names()[VIDEOS:]):
        warnings.append(
            f"{FLICKERING} is of videos 0 to 4 as they are; VBench has `vbench static_filter` pick them of 25"
        )
    return files, warnings


def _by_vbench(
    tool: Installed, videos: Path, names: list[str], info: Path | None, output: Path, gpus: int, resume: bool
) -> dict[str, dict[str, Any]]:
    """Scores by VBench itself, a dimension at a time."""
    from dit_accel.evals.vbench.scores import read
    from dit_accel.evals.vbench.suite import result_file

    for name in names:
        if resume and result_file(output, name).is_file():
            note(f"vbench: {name} is there")
            continue
        note(f"vbench: {name}")
        tool.evaluate(videos, name, output, info or tool.full_info, gpus, custom=info is None)
    raw = read([result_file(output, name) for name in names])
    return {name: {"value": raw[name], "better": "higher"} for name in names}


@commands.command(epilog=AGGREGATE_EXAMPLE)
@reported
def aggregate(
    files: Annotated[
        list[Path], typer.Argument(help="Results of VBench or `run`, or folders of them, of one model.")
    ],
    suite: Annotated[str, typer.Option("--suite", help="t2v or i2v.")] = "t2v",
    missing_as_zero: Annotated[
        bool, typer.Option("--missing-as-zero", help="Raw scores that are missing are 0, as VBench has it.")
    ] = False,
    percent: Annotated[bool, typer.Option("--percent", help="The files have percentages.")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Radar plot to write (PNG, SVG, PDF).")] = None,
    beside: Annotated[
        list[Path] | None, typer.Option("--beside", help="An earlier --out to draw too; more than once.")
    ] = None,
    label: res.LabelOption = None,
    out: res.OutOption = None,
    json: JsonOption = False,
) -> None:
    """Combine VBench's dimensions into Quality, Semantic and Total scores (i2v: I2V, Quality and Total).

    A score that lacks a dimension is null, unless --missing-as-zero.
    """
    from dit_accel import plots
    from dit_accel.evals.reports.result_files import load_all
    from dit_accel.evals.vbench import scores as vbench_scores

    if suite not in vbench_scores.SUITES:
        raise typer.BadParameter(f"`--suite` is {' or '.join(vbench_scores.SUITES)}, got {suite!r}")
    for path in filter(None, (out, plot)):
        check_output(path)
    if plot is not None:
        plots.check_plot(plot)
    raw = vbench_scores.read(files)
    raw = {name: value / 100 if percent else value for name, value in raw.items()}
    scores = vbench_scores.aggregate(raw, suite, missing_as_zero)
    warnings = []
    if scores.missing:
        effect = "counted as raw scores of 0" if missing_as_zero else "so its group and the total have none"
        warnings = [f"no score for {', '.join(scores.missing)}, {effect}"]
    answer = {
        **res.head(vbench_scores.SCORES_KIND, label),
        "results": files,
        **scores.to_dict(),
        "missing_as_zero": missing_as_zero,
        "skipped": {},
        "warnings": warnings,
    }
    if plot is not None:
        earlier = zip(load_all(beside or []), beside or [], strict=True)
        models = {name: vbench_scores.read_scores(path) for name, path in earlier}
        vbench_scores.radar({**models, label or "this": scores}, plot)
    for line in warnings:
        note(f"warning: {line}")
    if out is not None:
        write_json(out, answer)
    if json:
        return print_json(answer)
    print_table("", *vbench_scores.table(scores))
    for path in filter(None, (out, plot)):
        typer.echo(path)
    return None


def register(evaluations: typer.Typer) -> None:
    """Adds the commands of this module."""
    vbench_generate.register(commands)
    evaluations.add_typer(commands, name="vbench")
