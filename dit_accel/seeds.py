"""Seeds of noise: their range, and the generators made from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

END = 2**64  # torch takes seeds below
LARGEST_OPTION = 2**53 - 1  # of a command: exact in any JSON reader, and 1000 times it is a seed


def check_seed(seed: Any) -> int:
    """Returns `seed` if torch takes it.

    Raises:
        TypeError: not a whole number.
        ValueError: below 0, or 2**64 and above.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"a seed must be a whole number, got {seed!r:.80}")
    if not 0 <= seed < END:
        shown = f"{seed:.3g}" if abs(seed) < 10**300 else "a number of hundreds of digits"
        raise ValueError(f"a seed must be from 0 to 2**64 - 1, got {shown}")
    return seed


def generator(seed: int) -> torch.Generator:
    """A generator on the CPU, so that noise is the same for every device.

    Raises:
        TypeError, ValueError: see `check_seed`.
    """
    import torch

    return torch.Generator("cpu").manual_seed(check_seed(seed))
