"""Attention alone in the GPU benchmark: the shapes of real models, checked against float64, then timed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..errors import UnavailableError
from ..layout import TokenLayout
from ..patterns import Clear, Dense, Neighborhood, Pattern, Radial, SlidingTile
from .bench import cheapest_mask, excess_error
from .peers import Provider
from .scaling import Setting, Timer, Times
from .table import row

CHECKED_HEADS = 2  # of a real shape, the last ones
HEADINGS = ("shape", "pattern", "density", "block density", "provider", "ms", "TFLOP/s", "speed-up",
            "time / (dense x density)", "time / (dense x block density)")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One geometry of a real model at a real size, and a pattern on it; `small` is where it is checked."""

    name: str
    layout: TokenLayout
    small: TokenLayout
    heads: int
    head_dim: int
    pattern: Pattern
    small_pattern: Pattern

    @property
    def title(self) -> str:
        return f"{self.name} {self.pattern}"

    def setting(self, device: str, dtype: torch.dtype) -> Setting:
        return Setting(device, dtype, self.heads, self.head_dim)


def _flux(side: int) -> TokenLayout:
    return TokenLayout((1, side // 16, side // 16), text_len=512, text_first=True)


_IMAGE = TokenLayout((1, 24, 40), text_len=77, text_first=True)
_IMAGE_SD3 = TokenLayout((1, 24, 40), text_len=77)
_VIDEO = TokenLayout((7, 12, 20))
_VIDEO_TEXT = TokenLayout((7, 12, 20), text_len=100)
_SD3 = TokenLayout((1, 64, 64), text_len=333)
_WAN_480P, _WAN_720P = TokenLayout((21, 30, 52)), TokenLayout((21, 45, 80))
_HUNYUAN_720P = TokenLayout((33, 45, 80), text_len=256)
_WAN_RADIAL = Radial(0.2, first_frame_sink=True), Radial(0.2, 16, first_frame_sink=True)
_TILES = SlidingTile((3, 3, 3)), SlidingTile((3, 3, 3), (2, 4, 4))

CASES = (
    Case("flux-1024", _flux(1024), _IMAGE, 24, 128, Clear(16), Clear(6)),
    Case("flux-2048", _flux(2048), _IMAGE, 24, 128, Clear(16), Clear(6)),
    Case("flux-2048", _flux(2048), _IMAGE, 24, 128, Dense(), Dense()),
    Case("flux-4096", _flux(4096), _IMAGE, 24, 128, Clear(16), Clear(6)),
    Case("flux-8192", _flux(8192), _IMAGE, 24, 128, Clear(16), Clear(6)),
    Case("sd3-1024", _SD3, _IMAGE_SD3, 24, 64, Clear(16), Clear(6)),
    Case("sd3-1024", _SD3, _IMAGE_SD3, 24, 64, Dense(), Dense()),
    Case("hunyuan-720p", _HUNYUAN_720P, _VIDEO_TEXT, 24, 128, Radial(0.95), Radial(0.95, 16)),
    Case("hunyuan-720p", _HUNYUAN_720P, _VIDEO_TEXT, 24, 128, *_TILES),
    Case("wan-14b-720p", _WAN_720P, _VIDEO, 40, 128, *_WAN_RADIAL),
    Case("wan-14b-720p", _WAN_720P, _VIDEO, 40, 128, Neighborhood((9, 23, 41)), Neighborhood((3, 5, 7))),
    Case("wan-14b-720p", _WAN_720P, _VIDEO, 40, 128, Dense(), Dense()),
    Case("wan-1.3b-480p", _WAN_480P, _VIDEO, 12, 128, *_WAN_RADIAL),
    Case("wan-1.3b-480p", _WAN_480P, _VIDEO, 12, 128, Neighborhood((9, 15, 27)), Neighborhood((3, 5, 7))),
)


@dataclass(frozen=True)
class Result:
    """What one case in one dtype measured; `left_out` has the reasons of providers that did not run."""

    case: Case
    setting: Setting
    density: float
    block_density: float
    times: dict[str, Times]
    sparse: frozenset[str]
    ours: frozenset[str]
    yardstick: str  # the fastest exact dense provider
    left_out: dict[str, str]

    def tflops(self, provider: str) -> float:
        """10^12 multiplications and additions per second on the pairs that were asked for."""
        pairs = self.case.layout.seq_len**2 * (self.density if provider in self.sparse else 1)
        return 4 * self.case.heads * self.case.head_dim * pairs / self.times[provider][1] / 1e9

    def speedup(self, provider: str) -> float:
        """Times faster than the fastest exact dense provider."""
        return self.times[self.yardstick][1] / self.times[provider][1]

    def rows(self, here: dict) -> Iterator[dict[str, str]]:
        """Rows of `bench_<device>.csv`; `efficiency`, speed-up x block density, is what plans read: ours."""
        shape = f"{self.setting.shape(self.case.layout.seq_len)} {self.case.title}"
        write = partial(row, "block_sparse", here=here, device=self.setting.device)
        for provider, times in self.times.items():
            yield write(provider, "ms", shape, times)
            yield write(provider, "tflops", shape, self.tflops(provider))
            yield write(provider, "speedup", shape, self.speedup(provider))
            if provider in self.sparse:
                speedup = self.speedup(provider)
                yield write(provider, "density", shape, self.density)
                yield write(provider, "block_density", shape, self.block_density)
                yield write(provider, "time_over_density", shape, 1 / (speedup * self.density))
                if provider in self.ours:
                    yield write(provider, "efficiency", shape, speedup * self.block_density)

    def cells(self) -> Iterator[list[str]]:
        """A row of the table per provider, dense ones first."""
        dtype = str(self.setting.dtype).removeprefix("torch.")
        for provider in sorted(self.times, key=lambda name: name in self.sparse):
            speedup, sparse = self.speedup(provider), provider in self.sparse
            yield [
                f"{self.case.name}, {self.setting.heads} x {self.case.layout.seq_len} x "
                f"{self.setting.head_dim}, {dtype}",
                str(self.case.pattern) if sparse else "all pairs",
                f"{self.density:.4f}" if sparse else "1",
                f"{self.block_density:.4f}" if sparse else "1",
                provider,
                f"{self.times[provider][1]:.3f}",
                f"{self.tflops(provider):.0f}",
                f"{speedup:.2f}",
                f"{1 / (speedup * self.density):.2f}" if sparse else "",
                f"{1 / (speedup * self.block_density):.2f}" if sparse else "",
            ]


def check(case: Case, dtype: torch.dtype, device: str, provider: Provider) -> float:
    """Largest error on the small geometry as a multiple of what is allowed; more than 1 is wrong.

    Allowed is twice the error of SDPA under the same mask in the same dtype, plus eps; both against float64.
    """
    mask = cheapest_mask(case.small_pattern, case.small, device)
    generator = torch.Generator(device).manual_seed(0)
    shape = (2, 3, case.small.seq_len, case.head_dim)
    q, k, v = (torch.randn(shape, device=device, generator=generator).to(dtype) for _ in range(3))
    allowed = case.small_pattern.token_mask(case.small)
    if mask.order is not None:
        order = mask.order.cpu()
        allowed = allowed[order][:, order]
    allowed = allowed.to(device)
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=allowed)
    plain = scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    bound = 2 * (plain - exact).abs().max() + torch.finfo(dtype).eps
    return float((provider.prepare(q, k, v, mask)() - exact).abs().max() / bound)


def measure(
    case: Case, dtype: torch.dtype, device: str, providers: Iterable[Provider], timer: Timer
) -> Result:
    """Checks sparse providers, on the small geometry and on the real one, then times all that run, in turn.

    Raises:
        AssertionError: our kernel is wrong or does not run. Other providers are then left out.
        torch.OutOfMemoryError: the case is too large for the device.
        UnavailableError: no exact dense provider runs.
    """
    setting = case.setting(device, dtype)
    mask = cheapest_mask(case.pattern, case.layout, device)
    shape = (1, case.heads, case.layout.seq_len, case.head_dim)
    generator = torch.Generator(device).manual_seed(0)
    like = {"device": device, "dtype": dtype, "generator": generator}
    q, k, v = (torch.randn(shape, **like) for _ in range(3))
    runs, left_out, providers = {}, {}, list(providers)
    for provider in providers:
        try:
            if (reason := provider.missing()) is not None:
                raise UnavailableError(reason)
            run = provider.prepare(q, k, v, mask)
            out = run()
            if provider.sparse:
                few = (x[:, -CHECKED_HEADS:] for x in (q, k, v))
                real = excess_error(*few, mask, out[:, -CHECKED_HEADS:])
                error = max(real, check(case, dtype, device, provider), key=_badness)
                if not error <= 1:
                    raise AssertionError(f"error {error:.2f} times what is allowed, not timed")
            runs[provider.name] = run
        except (RuntimeError, ImportError, AssertionError, ValueError, TypeError, UnavailableError) as error:
            if provider.ours and isinstance(error, torch.OutOfMemoryError):
                raise
            if provider.ours:
                raise AssertionError(f"{case.title} {dtype}, {provider.name}: {error}") from error
            left_out[provider.name] = str(error).strip().split("\n")[0] or type(error).__name__
    exact = [p.name for p in providers if p.name in runs and not p.sparse and p.exact]
    if not exact:
        raise UnavailableError(f"{case.title}: no exact dense attention runs on {device}: {left_out}")
    times = dict(zip(runs, timer(*runs.values()), strict=True))
    return Result(
        case=case,
        setting=setting,
        density=mask.density,
        block_density=mask.block_density,
        times=times,
        sparse=frozenset(p.name for p in providers if p.sparse),
        ours=frozenset(p.name for p in providers if p.ours),
        yardstick=min(exact, key=lambda name: times[name][1]),
        left_out=left_out,
    )


def _badness(error: float) -> float:
    return float("inf") if error != error else error  # NaN is worst
