"""The README's table of model families: what each leaves dense, and how much there is to gain.

Written by `python -m dit_accel.evals.reports.recipe_table`, from the families themselves and from that
program's rows of attention's shares.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dit_accel.pipelines.families import families
from dit_accel.recipe.recipe import presets

HEAD = (
    "| family | diffusers' transformer | stays dense under every recipe | attention's share | a preset |",
    "|---|---|---|---:|---|",
)


def family_table(shares: Sequence[str], titles: dict[str, Sequence[str]], preferred: Collection[str]) -> str:
    """A row a family, by name.

    Args:
        shares: rows of recipe_table's table of shares.
        titles: of each family's models there.
        preferred: presets to name, otherwise the one of the shortest name.
    """
    of: dict[str, list[str]] = {}
    for row in shares:
        title, _, _, share, _ = (cell.strip() for cell in row.strip("|").split("|"))
        of.setdefault(title, []).append(share)
    rows = []
    for family in sorted(families(), key=lambda family: family.name):
        own = [share for title in dict.fromkeys(titles[family.name]) for share in of[title]]
        least, most = min(own, key=_percent), max(own, key=_percent)
        share = most if least == most else f"{least} to {most}"
        names = [name for name in presets(family.name) if not name.startswith("tiny-")]
        preset = min(names, key=lambda name: (name not in preferred, len(name), name))
        rows.append(
            f"| {family.name} | `{family.transformer}` | {family.stays_dense} | {share} | `{preset}` |"
        )
    return "\n".join([*HEAD, *rows])


def _percent(share: str) -> float:
    return float(share.rstrip("%"))
