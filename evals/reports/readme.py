"""Writes measured tables into the README: `python -m dit_accel.evals.reports.readme REPORT.json ...`.

Takes reports of `dit-accel compare` and replaces what stands between two markers: no figure is typed by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dit_accel.json_files import read_json

from . import marked

README = Path("README.md")
HEAD = "| method | s per step | step speed-up | s in all | speed-up | pairs computed | PSNR (dB) | SSIM |"
RULE = "|---|---:|---:|---:|---:|---:|---:|---:|"


def _row(method: dict) -> str:
    same = method["name"] == "dense"
    cells = (
        method["name"],
        f"{method['step_seconds_median']:.3f}",
        f"{method['step_speedup']:.2f}x",
        f"{method['seconds']:.1f}",
        f"{method['speedup']:.2f}x",
        f"{method['run_density']:.0%}",
        "" if same else "identical" if method["identical"] else f"{method['psnr_db']:.1f}",
        "" if same or method["ssim"] is None else f"{method['ssim']:.3f}",
    )
    return f"| {' | '.join(cells)} |"


def table(report: dict) -> str:
    """One report as Markdown: settings, a row per method with dense first, and where it was measured."""
    settings, here = report["settings"], report["environment"]
    frames = f", {settings['frames']} frames" if settings["frames"] > 1 else ""
    size = f"{settings['width']}x{settings['height']} px{frames}"
    gpu = settings["device"].startswith("cuda")
    device = (
        here["gpus"][0]["name"] if gpu else f"{here['cpu']['name']}, {here['cpu']['torch_threads']} threads"
    )
    versions = ", ".join(f"{name} {here['packages'][name]}" for name in ("torch", "diffusers", "dit-accel"))
    lines = [
        f"**{settings['model']}**, {size}, {settings['steps']} steps, {settings['dtype']}",
        "",
        HEAD,
        RULE,
        *(_row(method) for method in report["methods"]),
        "",
        f"{device}; {versions}; median of {settings['repeats']} run(s); `{report['command']}`",
    ]
    return "\n".join(lines)


def main(paths: list[str]) -> None:
    """Writes the tables of reports into the README."""
    if not paths:
        sys.exit(__doc__)
    reports = [read_json(path) for path in paths]
    marked.write(README, {"results": "\n\n".join(table(report) for report in reports)})


if __name__ == "__main__":
    main(sys.argv[1:])
