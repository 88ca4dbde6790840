"""Values that a threshold leaves out: the published rule, in loops, and the kernels against it."""

import math

import pytest
import torch
from attention_cases import THRESHOLD, far_apart

from dit_accel.errors import UnavailableError
from dit_accel.kernels import block_sparse_attention, can_run
from dit_accel.kernels.block_sparse import reference
from dit_accel.kernels.block_sparse.formats import FORMATS

LOG2_E = math.log2(math.e)


def by_hand(scores, mask, piece):
    """What is left out, in loops over the pieces of blocks as a kernel meets them; scores in base 2."""
    (bq, bk), out = mask.block_size, torch.zeros_like(scores, dtype=torch.bool)
    tiles = mask.block_tiles()
    for b, h in ((b, h) for b in range(2) for h in range(2)):
        for first in range(0, scores.shape[2], bq):
            own = tiles[h, first // bq].tolist()
            blocks = [j for j, x in enumerate(own) if x == -2] + [j for j, x in enumerate(own) if x >= 0]
            for row in range(first, min(first + bq, scores.shape[2]), piece[0]):
                rows = slice(row, min(row + piece[0], first + bq))
                most = torch.full_like(scores[b, h, rows, 0], -math.inf)
                for start in (j * bk + at for j in blocks for at in range(0, bk, piece[1])):
                    here = scores[b, h, rows, start : start + piece[1]]
                    if not here.numel():
                        continue
                    local = here.amax(-1)
                    most = torch.maximum(most, local)
                    seen = local > -math.inf
                    out[b, h, rows, start : start + piece[1]] = bool((local + THRESHOLD <= most)[seen].all())
    return out


def expected(q, k, v, mask, piece):
    """Output in float64, and the share of attended pairs whose values are left out."""
    allowed = mask.to_kernel_mask()
    scores = (q.double() @ k.double().mT * q.shape[3] ** -0.5).masked_fill(~allowed, -math.inf)
    lost = by_hand(scores * LOG2_E, mask, piece)
    p = scores.softmax(-1).nan_to_num(0.0).masked_fill(lost, 0.0)
    return p @ v.double(), float((lost & allowed).sum() / allowed.sum() / 2)


@pytest.mark.parametrize("block_size", [(64, 64), (32, 16)], ids=str)
def test_the_rule(block_size):
    q, k, v, mask = far_apart(block_size)
    for piece in (block_size, (6, block_size[1] // 2)):
        scores = (q @ k.mT * 32**-0.5 * LOG2_E).masked_fill(~mask.to_kernel_mask(), -math.inf)
        allowed = mask.to_kernel_mask().expand_as(scores)
        found = reference.skipped(scores, mask, THRESHOLD, piece)
        assert torch.equal(found & allowed, by_hand(scores, mask, piece) & allowed)
    assert not (reference.skipped(scores, mask, THRESHOLD) & ~found & allowed).any()  # pieces skip more
    out, lost = expected(q, k, v, mask, block_size)
    assert 0.1 < lost < 0.9
    actual, lse = block_sparse_attention(
        q, k, v, mask, backend="reference", pv_threshold=THRESHOLD, return_lse=True
    )
    torch.testing.assert_close(actual, out)
    plain, plain_lse = block_sparse_attention(q, k, v, mask, backend="reference", return_lse=True)
    assert torch.equal(lse, plain_lse)
    assert (actual - plain).abs().max() > 1e-4


@pytest.mark.skipif(
    bool(can_run("native", device="cpu", dtype=torch.float32, head_dim=32, block_size=(64, 64))),
    reason="no compiler",
)
class TestNative:
    @pytest.mark.parametrize("block_size", [(64, 64), (32, 128)], ids=str)
    def test_float32(self, block_size):
        """Judged for 64 keys and 6 rows."""
        q, k, v, mask = far_apart(block_size, dtype=torch.float32)
        out, lost = expected(q, k, v, mask, (6, 64))
        assert 0.1 < lost < 0.9
        actual = block_sparse_attention(q, k, v, mask, backend="native", pv_threshold=THRESHOLD)
        torch.testing.assert_close(actual.double(), out, rtol=1e-4, atol=1e-5)
        assert (block_sparse_attention(q, k, v, mask, backend="native") - actual).abs().max() > 1e-4

    def test_int8(self):
        """For 16 rows, which here are a block's; a code at a tie may be rounded the other way."""
        q, k, v, mask = far_apart((16, 64), dtype=torch.float32)
        options = {"scale": 32**-0.5, "pv_threshold": THRESHOLD}
        exact = (x.double() for x in (q, k, v))
        out, _ = reference.quantized_attention(*exact, mask, FORMATS["int8"], **options)
        given = {"backend": "native", "quantization": "int8"}
        actual = block_sparse_attention(q, k, v, mask, **given, pv_threshold=THRESHOLD)
        torch.testing.assert_close(actual.double(), out, rtol=0, atol=3e-3)
        assert (block_sparse_attention(q, k, v, mask, **given) - actual).abs().max() > 1e-2

    def test_tail(self):
        """Pooled keys are added beside what the rule leaves, as by the specification."""
        q, k, v, mask = far_apart((64, 64), dtype=torch.float32)
        outs = [
            block_sparse_attention(q, k, v, mask, backend=b, tail="pooled", pv_threshold=200.0)
            for b in ("native", "reference")
        ]
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)

    def test_blocks_that_it_cannot_judge(self):
        q, k, v, mask = far_apart((64, 16), dtype=torch.float32)
        with pytest.raises(UnavailableError, match="use key blocks of a multiple of 64 tokens"):
            block_sparse_attention(q, k, v, mask, backend="native", pv_threshold=THRESHOLD)


@pytest.mark.parametrize("threshold", [0, -1.0, math.inf, math.nan, "50", True])
def test_bad_thresholds(threshold):
    q, k, v, mask = far_apart((64, 64), seq=16, keys=16)
    with pytest.raises(ValueError, match="`pv_threshold` must be a finite number above 0"):
        block_sparse_attention(q, k, v, mask, pv_threshold=threshold)
