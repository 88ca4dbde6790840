"""`dit_accel.attention` against the formula in float64, in the model's token order."""

import math

import pytest
import torch
from attention_cases import SHORT, plain
from online_pattern import TopBlocks
from pattern_cases import STATIC

import dit_accel
from dit_accel import TokenLayout, patterns
from dit_accel.attention import functional
from dit_accel.patterns import (
    Agent,
    Clear,
    Dense,
    InLine,
    Neighborhood,
    ShiftedWindow,
    SparseVideoGen,
)

GRID, TEXT, VALID = (4, 4, 6), 7, torch.tensor([7, 3])
LAYOUTS = {
    "text-last": TokenLayout(GRID, TEXT),
    "text-first": TokenLayout(GRID, TEXT, text_first=True),
    "no-text": TokenLayout(GRID),
}
SVG = SparseVideoGen(0.5, block_size=8)
TOP = TopBlocks(0.3)


def tensors(layout, dtype=torch.float32, heads=2, dim=16):
    generator = torch.Generator().manual_seed(0)
    shape = (2, layout.seq_len, heads, dim)
    made = [2 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]
    return [x.transpose(1, 2) for x in made]


def exact(q, k, v, allowed, scale):
    """Output and log-sum-exp in float64."""
    scores = (q.double() @ k.double().mT * scale).masked_fill(~allowed, -math.inf)
    return scores.softmax(-1) @ v.double(), scores.logsumexp(-1)


def check(actual, qkv, allowed, scale=None):
    """The fp64 rule for the output, and for the log-sum-exp where there is one."""
    scale = qkv[0].shape[-1] ** -0.5 if scale is None else scale
    out, lse = actual if isinstance(actual, tuple) else (actual, None)
    expected, expected_lse = exact(*qkv, allowed, scale)
    assert out.dtype == qkv[0].dtype
    within(out, plain(*qkv, allowed, scale), expected)
    if lse is not None:
        assert lse.dtype == torch.promote_types(out.dtype, torch.float32)
        scores = (qkv[0].to(lse.dtype) @ qkv[1].to(lse.dtype).mT * scale).masked_fill(~allowed, -math.inf)
        within(lse, scores.logsumexp(-1), expected_lse)


def within(actual, plain, exact):
    """The rule; float64 is its own reference, and rounds in another order."""
    rounding = 1e-13 if actual.dtype == torch.float64 else 0
    allowance = rounding + 2 * (plain - exact).abs().max() + torch.finfo(actual.dtype).eps * exact.abs().max()
    assert (actual - exact).abs().max() <= allowance


def hides_padding(layout, text_valid):
    return True if text_valid is None else ~layout.padding(text_valid)[:, None, None]


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("pattern", STATIC.values(), ids=STATIC)
def test_static_patterns(pattern, layout, padded):
    if padded and not layout.text_len:
        pytest.skip("no text")
    valid, qkv = VALID if padded else None, tensors(layout)
    allowed = (pattern.token_mask(layout) & hides_padding(layout, valid)).expand(2, 2, -1, -1)
    check(dit_accel.attention(*qkv, pattern, layout, text_valid=valid), qkv, allowed)
    check(dit_accel.attention(*qkv, pattern, layout, text_valid=valid, return_lse=True), qkv, allowed)


@pytest.mark.parametrize("dtype", SHORT, ids=SHORT.get)
@pytest.mark.parametrize("pattern", [Dense(), Neighborhood((3, 3, 3))], ids=["dense", "sparse"])
def test_dtypes_and_scale(pattern, dtype):
    layout = LAYOUTS["text-first"]
    qkv = tensors(layout, dtype)
    allowed = (pattern.token_mask(layout) & hides_padding(layout, VALID)).expand(2, 2, -1, -1)
    for lse in (False, True):
        check(
            dit_accel.attention(*qkv, pattern, layout, text_valid=VALID, scale=0.3, return_lse=lse),
            qkv, allowed, 0.3,
        )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_sparse_videogen(layout):
    """Each head of each sample is spatial or temporal, and output and lse are those of the same mask."""
    valid, qkv = VALID if layout.text_len else None, tensors(layout, heads=4)
    out, lse = dit_accel.attention(*qkv, SVG, layout, text_valid=valid, return_lse=True)
    assert torch.equal(dit_accel.attention(*qkv, SVG, layout, text_valid=valid), out)
    chosen = []
    for b in range(2):
        for h in range(4):
            errors, own = [], [x[b, h][None, None] for x in qkv]
            for kind in (SVG.spatial, SVG.temporal):
                allowed = kind.token_mask(layout) & hides_padding(layout, valid)
                allowed = allowed.expand(2, 1, *allowed.shape[-2:])[b][None]
                expected, expected_lse = exact(*own, allowed, 16**-0.5)
                errors.append((out[b, h] - expected).abs().max() + (lse[b, h] - expected_lse).abs().max())
            assert min(errors) < 1e-5 < max(errors)
            chosen.append(errors[0] < errors[1])
    assert 0 < sum(chosen) < len(chosen)


@pytest.mark.parametrize("dtype", SHORT, ids=SHORT.get)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_online_patterns(layout, dtype):
    valid, qkv = VALID if layout.text_len else None, tensors(layout, dtype)
    size = functional._of((TOP,) * 2, layout, torch.device("cpu")).block_size
    chosen = TOP.select(*qkv[:2], layout, block_size=size).to_token_mask()
    allowed = chosen & hides_padding(layout, valid)
    check(dit_accel.attention(*qkv, TOP, layout, text_valid=valid, return_lse=True), qkv, allowed)


def test_every_pattern_is_here():
    public = {getattr(patterns, name) for name in patterns.__all__} - {patterns.Pattern}
    public = {pattern for pattern in public if not pattern.__subclasses__() or pattern is Clear}
    # in tests of their own
    elsewhere = {"Agent", "ByNoise", "InLine", "Calibrated", "ChunkCausal", "ChunkGrowth"}
    elsewhere |= {"Clustered", "Rectified", "Routed", "Skipping", "SparseLinear", "VideoSparse"}
    here = {type(pattern).__name__ for pattern in [*STATIC.values(), SVG]}
    assert {pattern.__name__ for pattern in public} <= here | elsewhere


def test_step_decides_where_windows_are():
    layout, moving = TokenLayout((1, 9, 16)), ShiftedWindow()
    qkv = tensors(layout)
    other = next(step for step in range(9) if moving.at_step(step) != moving.at_step(0))
    for step in (0, other):
        allowed = moving.at_step(step).token_mask(layout).expand(2, 2, -1, -1)
        check(dit_accel.attention(*qkv, moving, layout, step=step), qkv, allowed)


@pytest.mark.parametrize("pattern", [Dense(), Clear(2), TOP], ids=["dense", "static", "online"])
def test_gradients(pattern):
    """Also after the masks were made in inference mode."""
    layout = LAYOUTS["text-first"]
    functional._of.cache_clear()
    with torch.inference_mode():
        dit_accel.attention(*tensors(layout), pattern, layout)
    mine, theirs = ([x.detach().requires_grad_() for x in tensors(layout)] for _ in range(2))
    dit_accel.attention(*mine, pattern, layout, text_valid=VALID).square().sum().backward()
    if pattern is TOP:
        size = functional._of((TOP,) * 2, layout, torch.device("cpu")).block_size
        allowed = TOP.select(*tensors(layout)[:2], layout, block_size=size).to_token_mask()
    else:
        allowed = pattern.token_mask(layout)
    allowed = (allowed & hides_padding(layout, VALID)).expand(2, 2, -1, -1)
    exact(*theirs, allowed, 0.25)[0].square().sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3 * b.grad.abs().max().item())


def test_in_compiled_code():
    layout = LAYOUTS["text-last"]
    qkv = tensors(layout)

    def doubled(q, k, v):
        return 2 * dit_accel.attention(q * 1, k, v, Clear(2), layout)

    compiled = torch.compile(doubled, backend="aot_eager")
    torch.testing.assert_close(compiled(*qkv), doubled(*qkv))
    torch.compiler.reset()


@pytest.mark.parametrize(("family", "pattern"), [("flux", Clear(3)), ("hunyuan", Neighborhood((3, 3, 3)))])
def test_is_what_processors_compute(request, family, pattern):
    """The first accelerated layer of a pipeline's call."""
    from dit_accel.attention.masked import Masked

    case, seen = request.getfixturevalue(family), []
    original = Masked.__call__

    def spied(self, call):
        out = original(self, call)
        seen.append((call, out))
        return out

    recipe = dit_accel.Recipe(pattern, order="raster", block_size=(16, 16))
    with pytest.MonkeyPatch.context() as patch, dit_accel.accelerated(case.pipe, recipe):
        patch.setattr(Masked, "__call__", spied)
        case.run(case.pipe, steps=1, batch=2)
    call, out = seen[0]
    actual = dit_accel.attention(call.q, call.k, call.v, pattern, call.layout, text_valid=call.text_valid)
    torch.testing.assert_close(actual, out, rtol=1e-5, atol=1e-5)


class TestErrors:
    LAYOUT = TokenLayout(GRID)

    @pytest.mark.parametrize("pattern", [Clear(2), Dense(), InLine(), Agent((1, 2, 2))], ids=str)
    @pytest.mark.parametrize(
        ("valid", "message"),
        [
            (torch.tensor([8, 2]), "between 0 and the 7 text tokens of the layout, got 8"),
            (torch.tensor([-1, 2]), "between 0 and the 7 text tokens of the layout, got -1"),
            (torch.tensor([2]), r"must be integers of shape \(2,\), got torch.int64 \(1,\)"),
            (torch.tensor([2.0, 3.0]), r"must be integers of shape \(2,\), got torch.float32"),
        ],
        ids=["beyond", "below", "samples", "floats"],
    )
    def test_lengths_of_text_are_checked_whatever_computes(self, pattern, valid, message):
        layout = TokenLayout(GRID, TEXT)
        with pytest.raises(ValueError, match=message):
            dit_accel.attention(*tensors(layout), pattern, layout, text_valid=valid)
        with pytest.raises(ValueError, match="the layout has no text"):
            dit_accel.attention(*tensors(self.LAYOUT), pattern, self.LAYOUT, text_valid=valid)
        outs = [
            dit_accel.attention(*tensors(layout), pattern, layout, text_valid=given)
            for given in (VALID, VALID.tolist(), VALID.int())
        ]
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (
                {"layout": TokenLayout((4, 4, 5))},
                ValueError,
                r"`q` must have .* the 80 tokens of the",
            ),
            ({"pattern": Neighborhood((5, 3, 3))}, ValueError, "window"),
            ({"tail": "linear"}, ValueError, "`tail` must be 'pooled' or None, got 'linear'"),
            (
                {"tail": "pooled", "pattern": Neighborhood((3, 3, 3), is_causal=(True, False, False))},
                ValueError,
                "hides keys on purpose",
            ),
            ({"backend": "fast"}, ValueError, "backend"),
            ({"k": 5}, ValueError, r"`k` must have the shape of `q`, \(2, 2, 96, 16\), got \(2, 2, 5, 16\)"),
        ],
        ids=["layout", "pattern", "tail", "causal", "backend", "keys"],
    )
    def test_say_what_was_wrong(self, change, error, message):
        q, k, v = tensors(self.LAYOUT)
        change = dict(change)
        layout, pattern = change.pop("layout", self.LAYOUT), change.pop("pattern", Clear(2))
        k = k[:, :, : change.pop("k", None)]
        with pytest.raises(error, match=message):
            dit_accel.attention(q, k, v, pattern, layout, **change)
