"""Named settings of methods for model families, as they were published for runs above native size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dit_accel.arguments import shown


@dataclass(frozen=True)
class Preset:
    """A method with its settings for a family; options of the method suit the model.

    Attributes:
        method: a name of `dit_accel.highres.METHODS`.
        steps, strength, shift: as of `dit_accel.highres.generate`.
        guidance, guidance_above: guidance scale of the native pass and above.
        source: where they were published.
    """

    name: str
    family: str
    method: str
    steps: int
    strength: float
    shift: float | None
    guidance: float
    guidance_above: float
    source: str

    def arguments(self) -> dict[str, Any]:
        """Arguments of `dit_accel.highres.generate`."""
        found: dict[str, Any] = {"method": self.method, "strength": self.strength}
        found |= {} if self.shift is None else {"shift": self.shift}
        found |= {"num_inference_steps": self.steps, "guidance_scale": self.guidance}
        return {**found, "above": {"guidance_scale": self.guidance_above}}

    def check_family(self, family: str) -> None:
        """Raise ValueError unless it is for this family."""
        if family != self.family:
            raise ValueError(
                f"preset {self.name!r} is for the family {self.family!r}, and this is {family!r}"
            )

    def describe(self) -> str:
        """What it sets, in a line."""
        scale = f"{self.guidance:g}"
        scale += "" if self.guidance == self.guidance_above else f", then {self.guidance_above:g}"
        shift = "" if self.shift is None else f", shift {self.shift:g}"
        return f"{self.method}: {self.strength:.3g} of {self.steps} steps{shift}, guidance {scale}"


_OURS = "FreeSwim's method; settings of this project"
_ALL = (
    Preset("flux-swim", "flux", "swim", 28, 0.7, 3.0, 3.5, 3.5, _OURS),
    Preset("flux-clear", "flux", "clear", 20, 0.7, 3.0, 3.5, 7.5, "CLEAR, arXiv 2412.16112"),
    Preset("flux-imax", "flux", "projected", 30, 1.0, 6.0, 3.5, 7.0, "I-Max, arXiv 2410.07536"),
    Preset("flux-hiflow", "flux", "flow", 30, 16 / 30, None, 3.5, 4.5, "HiFlow, arXiv 2504.06232"),
    Preset("sd3-swim", "sd3", "swim", 28, 0.7, 6.0, 7.0, 7.0, _OURS),
    Preset("wan-swim", "wan", "swim", 50, 0.7, 9.0, 5.0, 5.0, "FreeSwim, 2025"),
    Preset("wan-growing", "wan", "growing", 50, 0.4, None, 5.0, 10.0, "RectifiedHR, arXiv 2503.02537"),
    Preset("hunyuan-video-swim", "hunyuan-video", "swim", 50, 0.7, 9.0, 6.0, 6.0, _OURS),
)


def presets(family: str | None = None) -> dict[str, Preset]:
    """Presets by name, of a family or all.

    Raises:
        ValueError: a family that has none.
    """
    found = {preset.name: preset for preset in _ALL if family in (None, preset.family)}
    if not found:
        families = ", ".join(dict.fromkeys(preset.family for preset in _ALL))
        raise ValueError(
            f"no preset for high resolution is for the family {shown(family)}; the families are {families}"
        )
    return found


def preset_of(name: str) -> Preset | None:
    """The preset of a name, None where it is that of a method.

    Raises:
        ValueError: neither.
    """
    from .registry import METHODS

    if name in METHODS:
        return None
    if name not in presets():
        raise ValueError(
            f"`--highres` must be one of {', '.join(METHODS)}, or a preset ({', '.join(presets())}), got "
            f"{name!r}"
        )
    return presets()[name]
