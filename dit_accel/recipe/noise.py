"""Ranges of the flow's noise level, by which dense steps may be named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dit_accel.arguments import noise_level, shown


@dataclass(frozen=True)
class NoiseRange:
    """The noise levels from `low` to `high`, both of them included.

    A latent of a flow at noise level sigma is (1 - sigma) data + sigma noise: 1 is where a run begins, 0
    where it ends. In recipes and their files it is written `{"sigma": (low, high)}`.

    Raises:
        ValueError: levels that are not numbers from 0 to 1, or a `low` above `high`.
    """

    low: float
    high: float = 1.0

    def __post_init__(self):
        for name in ("low", "high"):
            object.__setattr__(self, name, noise_level(name, getattr(self, name)))
        if self.low > self.high:
            raise ValueError(
                f"a range of noise levels must be (low, high), got ({self.low}, {self.high}); a run begins "
                "at noise level 1, the high end"
            )

    @classmethod
    def of(cls, name: str, value: Mapping[str, Any]) -> NoiseRange:
        """From `{"sigma": (low, high)}`; `name` is what the errors call it."""
        levels = value.get("sigma") if list(value) == ["sigma"] else None
        if not isinstance(levels, tuple | list) or len(levels) != 2:
            raise ValueError(
                f"`{name}` by noise level must be {{'sigma': (low, high)}}, such as {{'sigma': (0.9, 1.0)}}, "
                f"got {shown(dict(value))}"
            )
        try:
            return cls(*levels)
        except ValueError as error:
            raise ValueError(f"`{name}`: {error}") from None

    def __contains__(self, sigma: float) -> bool:
        return self.low <= sigma <= self.high

    def __str__(self) -> str:
        return f"sigma {self.low:g} to {self.high:g}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for YAML or JSON."""
        return {"sigma": [self.low, self.high]}
