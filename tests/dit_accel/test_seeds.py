"""Seeds within torch's range, and everything else refused with the range."""

import re

import pytest
import torch

from dit_accel.generation import Request
from dit_accel.guidance.trials import generate
from dit_accel.seeds import LARGEST_OPTION, check_seed, generator


@pytest.mark.parametrize("seed", [0, 1, LARGEST_OPTION, 1000 * LARGEST_OPTION + 999, 2**63, 2**64 - 1])
def test_seeds_that_torch_takes(seed):
    expected = torch.randn(4, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(torch.randn(4, generator=generator(seed)), expected)
    assert Request("a", seed=seed).seed == seed


@pytest.mark.parametrize(
    "seed", [-1, 2**64, 2**64 + 5, -(2**63), 10**400, -(10**5000)], ids=lambda n: hex(n)[:9]
)
@pytest.mark.parametrize("take", [check_seed, generator, lambda seed: Request("a", seed=seed)])
def test_seeds_out_of_range(seed, take):
    with pytest.raises(ValueError, match=re.escape("a seed must be from 0 to 2**64 - 1")) as error:
        take(seed)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("seed", [1.0, "3", None, True, float("nan"), 2.0**64, "9" * 10_000])
def test_seeds_that_are_no_whole_numbers(seed):
    with pytest.raises(TypeError, match="a seed must be a whole number") as error:
        check_seed(seed)
    assert len(str(error.value)) < 200


def test_seeds_of_a_batch(flux):
    with pytest.raises(ValueError, match=r"from 0 to 2\*\*64 - 1"):
        generate(flux.pipe, ["a"], [2**64])
