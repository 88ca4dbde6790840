"""Rotary tables against the formulas, frequency by frequency, and on transformers."""

import math

import pytest
import torch

from dit_accel.errors import UnavailableError
from dit_accel.highres import Rotary, rotary
from dit_accel.highres.rotary_tables import frequencies_of

POSITIONS = torch.arange(128)


def written_out(dim, scale, length, kappa, theta=10000.0):
    """YaRN's frequencies and factor, one after the other."""

    def correction(r):
        return dim * math.log(length / (2 * math.pi * r * kappa)) / (2 * math.log(theta))

    found = []
    for j in range(dim // 2):
        f = theta ** (-2 * j / dim)
        extended = (theta * scale ** (dim / (dim - 2))) ** (-2 * j / dim)
        value = None
        for low, high, other in ((1.25, 0.75, extended), (16, 2, f)):
            a = max(math.floor(correction(low)), 0)
            b = min(math.ceil(correction(high)), dim - 1, dim / 2)
            b += 0.001 if a == b else 0
            keep = 1 - min(max((j - a) / (b - a), 0), 1)
            value = (f / scale if value is None else value) * (1 - keep) + other * keep
        found.append(value)
    return torch.tensor(found, dtype=torch.float64), 1 + 0.1 * math.log(scale)


@pytest.mark.parametrize("dim", [8, 12, 56, 128])
@pytest.mark.parametrize("level", [1.0, 0.7, 0.1])
@pytest.mark.parametrize("scale", [1.5, 2.0, 4.0])
def test_yarn_and_dype(dim, level, scale):
    wanted, factor = written_out(dim, scale, 64, level**2)
    options = {"scale": scale, "original": 64}
    frequencies, found = frequencies_of(dim, POSITIONS, "dype", timestep=level, **options)
    assert found == pytest.approx(factor)
    assert torch.allclose(frequencies, wanted, rtol=1e-12)
    if level == 1:
        assert torch.equal(frequencies_of(dim, POSITIONS, "yarn", **options)[0], frequencies)
    cos, sin = rotary(POSITIONS, dim, method="dype", timestep=level, **options)
    angles = POSITIONS[:, None] * wanted
    assert torch.allclose(cos[:, 0::2].double(), factor * angles.cos(), atol=3e-7)
    assert torch.equal(sin[:, 0::2], sin[:, 1::2])
    assert torch.allclose(sin[:, 0::2].double(), factor * angles.sin(), atol=3e-7)


def test_dype_ends_at_the_models_own_frequencies():
    frequencies, factor = frequencies_of(56, POSITIONS, "dype", 2.0, 64, 0.0)
    assert torch.equal(frequencies, frequencies_of(56, POSITIONS, "none")[0])
    assert factor == pytest.approx(1 + 0.1 * math.log(2))
    nearly = frequencies_of(56, POSITIONS, "dype", 2.0, 64, 1e-6)[0]
    assert torch.allclose(nearly, frequencies)


def test_ntk():
    found = frequencies_of(56, POSITIONS, "ntk", 3.0)[0]
    wanted = [(10000 * 3 ** (56 / 54)) ** (-2 * j / 56) for j in range(28)]
    assert torch.allclose(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12)
    by_length = frequencies_of(56, POSITIONS, "ntk", original=64)[0]
    assert torch.equal(by_length, frequencies_of(56, POSITIONS, "ntk", 2.0)[0])
    for method in ("ntk", "yarn"):  # in training, nothing changes
        same = frequencies_of(56, POSITIONS, method, original=128)
        assert torch.equal(same[0], frequencies_of(56, POSITIONS, "none")[0])
        assert same[1] == 1


def test_none_is_diffusers_table():
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    wanted = get_1d_rotary_pos_embed(
        56, POSITIONS.float(), repeat_interleave_real=True, use_real=True, freqs_dtype=torch.float64
    )
    for ours, theirs in zip(rotary(POSITIONS, 56, method="none"), wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "pi"}, "`method` must be one of none, ntk, yarn, dype, got 'pi'"),
        ({"method": "ntk", "scale": 0.5}, "`scale` must be at least 1, got 0.5"),
        ({"method": "yarn", "scale": 2}, "`original` is needed"),
        ({"method": "dype", "scale": 2, "original": 64}, "`timestep` is needed"),
        ({"method": "dype", "scale": 2, "original": 64, "timestep": 2}, "`timestep` must be a noise level"),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        rotary(POSITIONS, 56, **arguments)
    with pytest.raises(ValueError, match="`dim` must be even, got 7"):
        rotary(POSITIONS, 7, method="ntk")


# -- on transformers -----------------------------------------------------------------------------------------


def tables_in(family, option, trained, **options):
    """What the rotary module of a pipeline gives in its first call."""
    pipe = family.make()
    transformer = pipe.transformer
    module = getattr(transformer, "pos_embed", None) or transformer.rope
    seen = []
    with (
        option.applied(transformer, trained),
        module.register_forward_hook(lambda m, a, out: seen.append(out)),
    ):
        family.run(pipe, steps=1, **options)
    return [table.reshape(-1, table.shape[-1]) for table in seen[0]]


@pytest.mark.parametrize("name", ["flux", "wan", "hunyuan"])
def test_axes_are_extended_by_their_own_lengths(name, families):
    dims, text = {"flux": ((4, 6, 6), 7), "wan": ((8, 4, 4), 0), "hunyuan": ((4, 6, 6), 0)}[name]
    frames, rows, columns = (1, 8, 12) if name == "flux" else (3, 6, 8)
    theta = 256.0 if name == "hunyuan" else 10000.0
    cos, sin = tables_in(families[name], Rotary("yarn"), (4, 6))
    f, h, w = torch.cartesian_prod(*(torch.arange(n) for n in (frames, rows, columns))).unbind(1)
    wanted = [
        rotary(f, dims[0], method="none", theta=theta),
        rotary(h, dims[1], method="yarn", scale=rows / 4, original=4, theta=theta),
        rotary(w, dims[2], method="yarn", scale=columns / 6, original=6, theta=theta),
    ]
    for i, table in enumerate((cos, sin)):
        assert torch.allclose(table[text:], torch.cat([one[i] for one in wanted], 1), atol=1e-6)


def test_nothing_changes_at_the_trained_size(families):
    for name, trained in (("flux", (8, 12)), ("wan", (6, 8)), ("hunyuan", (6, 8))):
        family = families[name]
        pipe = family.make()
        plain = family.run(pipe)
        with Rotary("dype").applied(pipe.transformer, trained):
            assert torch.allclose(family.run(pipe), plain, atol=1e-6)
        with Rotary("dype").applied(pipe.transformer, (3, 4)):
            assert not torch.allclose(family.run(pipe), plain, atol=1e-4)
        assert torch.equal(family.run(pipe), plain)


def test_fixed_factor_and_clip(flux):
    cos, _ = tables_in(SimpleFamily(flux), Rotary("ntk", factor=10, clip=True), (4, 6))
    rows = torch.arange(8).repeat_interleave(12)
    plain = torch.tensor([10000.0 ** (-2 * j / 6) for j in range(3)], dtype=torch.float64)
    slow = torch.tensor([100000.0 ** (-2 * j / 6) for j in range(3)], dtype=torch.float64)
    frequencies = torch.maximum(slow, plain / math.sqrt(96 / 24))
    wanted = (rows[:, None] * frequencies).cos().repeat_interleave(2, 1).float()
    assert torch.allclose(cos[7:, 4:10], wanted, atol=1e-6)


class SimpleFamily:
    """A family's tools, with a pipeline that is there already."""

    def __init__(self, tools):
        self.run, self.make = tools.run, lambda: tools.pipe


def test_sd3_has_a_table_of_places(sd3):
    with (
        pytest.raises(UnavailableError, match="rotary=None"),
        Rotary("ntk").applied(sd3.pipe.transformer, (4, 4)),
    ):
        pass


def test_bad_options():
    with pytest.raises(ValueError, match="`rotary` must be one of ntk, yarn, dype"):
        Rotary("none")
    with pytest.raises(ValueError, match='options of method "ntk"'):
        Rotary("yarn", clip=True)
