"""Writes measured tables into the README: `python -m dit_accel.evals.readme REPORT.json ...`.

Takes reports of `dit-accel compare` and replaces what stands between two markers: no figure is typed by hand.
The README's picture becomes that of the first report, a video's a strip of three frames.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from . import media

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
README = Path("README.md")
PICTURE = Path("demos/assets/compare.png")
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


def replace(text: str, tables: list[str]) -> str:
    """`text` with the tables between the markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the README must have {BEGIN} and {END} once each, in this order")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    body = "\n\n".join(tables)
    return f"{before}{BEGIN}\n{body}\n{END}{after}"


def main(paths: list[str]) -> None:
    if not paths:
        sys.exit(__doc__)
    reports = [json.loads(Path(path).read_text()) for path in paths]
    frames = media.load(reports[0]["files"]["picture"])
    README.write_text(replace(README.read_text(), [table(report) for report in reports]))
    media.save(PICTURE, media.strip(frames, 3))


if __name__ == "__main__":
    main(sys.argv[1:])
