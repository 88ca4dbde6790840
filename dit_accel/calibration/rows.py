"""Stretches of a run and the rows of a calibration that they have."""

from __future__ import annotations


def stretch_rows(steps: int, stretches: int) -> tuple[int, ...]:
    """The row of each of so many equal stretches of a run: own ones in its first half, then one for all.

    Rows are numbered without gaps by the stretches that the steps of the run fall into; where it has fewer
    steps than stretches, the others have the row of one before.

    Source: of one row for the second half, Zhao et al., "PAROAttention", 2025.
    """
    half = (stretches + 1) // 2
    wanted = [min(stretch, half) for stretch in range(stretches)]
    met = {wanted[step * stretches // steps] for step in range(steps)}
    number = {row: at for at, row in enumerate(sorted(met))}
    return tuple(number[max(r for r in met if r <= max(row, min(met)))] for row in wanted)
