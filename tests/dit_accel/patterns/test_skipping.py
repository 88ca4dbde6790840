"""Skip bits that last for a run, against dense attention and loops over queries and blocks in float64."""

import math

import pytest
import torch

from dit_accel import TokenLayout, attention
from dit_accel.attention.call import AttentionCall
from dit_accel.attention.layer_masks import LayerMasks, layer_attention
from dit_accel.attention.run_memory import RunMemory
from dit_accel.masks import orders
from dit_accel.patterns import Dense, Neighborhood, Skipping

SIZE = (16, 8)
LAYOUTS = {
    "video": TokenLayout((3, 6, 7)),
    "text-last": TokenLayout((2, 6, 8), 9),
    "text-first": TokenLayout((1, 9, 12), 16, True),
    "anchor": TokenLayout((1, 8, 8), 5, anchor=(1, 3, 4)),
    "short": TokenLayout((1, 3, 4), 20),
}


def inputs(layout, seed, batch=2, heads=2, dim=16):
    """q, k, v whose scores spread widely, so that some blocks weigh nothing; float64."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, heads, layout.seq_len, dim, generator=generator, dtype=torch.float64)
    smooth = torch.linspace(0, 9, layout.seq_len, dtype=torch.float64)[:, None] + torch.arange(dim)
    return q + 3 * smooth.sin(), k + 3 * smooth.sin(), v


def blocks_of(layout, order):
    """Tokens of the blocks of queries and of keys, and which of those hold visual tokens alone."""
    first = layout.visual_slice.start
    visual = [first + int(i) for i in order]
    others = [t for t in range(layout.seq_len) if t not in set(visual)]
    others.sort(key=lambda t: t < first)  # anchor, then text
    tokens = visual + others
    cut = [[tokens[at : at + size] for at in range(0, len(tokens), size)] for size in SIZE]
    return [[(block, set(visual).issuperset(block)) for block in blocks] for blocks in cut]


def marked(q, k, mask, blocks, pattern, hidden, scale):
    """What a step that computed `mask` (S, S) of a head marks, pairs of numbers of blocks, by the words."""
    found = set()
    scores = (q @ k.T * scale).masked_fill(~mask | hidden, -math.inf)
    for r, (row, own) in enumerate(blocks[0]):
        for c, (column, visual) in enumerate(blocks[1]):
            if own and visual:
                weak = [
                    max(scores[t, j] for j in column) <= scores[t].max() + pattern.threshold * math.log(2)
                    for t in row
                ]
                if all(weak):
                    found.add((r, c))
    return found


class Run:
    """A layer in a run, and the same by loops."""

    def __init__(self, pattern, layout, order="raster", text_valid=None, scale=None):
        self.pattern, self.layout, self.text_valid, self.scale = pattern, layout, text_valid, scale
        masks = LayerMasks(layout, order, SIZE, torch.device("cpu"))
        self.layer, self.memory = layer_attention([pattern] * 2, masks), RunMemory()
        visual = orders.raster(layout.grid) if isinstance(order, str) else order
        self.blocks = blocks_of(layout, visual)
        self.mask = torch.ones(2, 2, layout.seq_len, layout.seq_len, dtype=torch.bool)
        self.hidden = torch.zeros(2, layout.seq_len, dtype=torch.bool)
        if text_valid is not None:
            self.hidden = layout.padding(text_valid)

    def step(self, number, evaluation=0):
        """The layer's output and that by hand, before marks of this step count."""
        q, k, v = inputs(self.layout, 10 * number + evaluation)
        memory = self.memory.call("transformer", (number, evaluation)).within("layer")
        call = AttentionCall(
            q, k, v, self.layout, dense=None, text_valid=self.text_valid, scale=self.scale, step=number,
            backend="reference", memory=memory,
        )  # fmt: skip
        scale = 16**-0.5 if self.scale is None else self.scale
        scores = (q @ k.mT * scale).masked_fill(~self.mask | self.hidden[:, None, None], -math.inf)
        return self.layer(call), scores.softmax(-1) @ v, (q, k, scale), call

    def mark(self, q, k, scale):
        for b in range(2):
            for h in range(2):
                own = q[b, h], k[b, h], self.mask[b, h], self.blocks, self.pattern, self.hidden[b], scale
                for r, c in marked(*own):
                    rows, columns = self.blocks[0][r][0], self.blocks[1][c][0]
                    self.mask[b, h, torch.tensor(rows)[:, None], torch.tensor(columns)] = False


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_step_computes_what_earlier_ones_left(name):
    layout = LAYOUTS[name]
    text_valid = torch.tensor([3, 0]) if layout.text_len else None
    run = Run(Skipping(-3, block_size=SIZE), layout, text_valid=text_valid)
    left = []
    for number in range(4):
        out, expected, qk, call = run.step(number)
        shown = slice(None) if text_valid is None else ~run.hidden[:, None, :, None].expand(out.shape)
        torch.testing.assert_close(out[shown], expected[shown], rtol=0, atol=1e-12)
        density = float(call.notes["achieved"][0])
        assert density == pytest.approx(float(run.mask.double().mean()))
        left.append(density)
        run.mark(*qk)
    assert left[0] == 1
    assert left == sorted(left, reverse=True)
    assert (left[-1] < left[1] < 1) == (name != "short")  # whose blocks all hold text


@pytest.mark.parametrize("option", [{"every": 2}, {"reset": 3}, {"every": 2, "reset": 3}], ids=str)
def test_when_marks_are_made_and_taken_back(option):
    pattern = Skipping(-3, block_size=SIZE, **option)
    run = Run(pattern, LAYOUTS["video"], scale=0.3)
    for number in range(7):
        age = number % pattern.reset if pattern.reset else number
        if age == 0:
            run.mask[:] = True
        out, expected, qk, _ = run.step(2 * number)  # steps that a cache skips do not count
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        if age % pattern.every == 0:
            run.mark(*qk)


def test_a_second_evaluation_of_a_step_is_no_step_more():
    run = Run(Skipping(-3, every=2, block_size=SIZE), LAYOUTS["video"])
    for number, evaluation in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (3, 0)):
        out, expected, qk, _ = run.step(number, evaluation)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        if number % 2 == 0:
            run.mark(*qk)


def test_blocks_are_cut_in_the_order_of_the_recipe():
    layout = LAYOUTS["text-last"]
    run = Run(Skipping(-3, block_size=SIZE), layout, order=orders.tiles(layout.grid, (1, 4, 4)))
    for number in range(3):
        out, expected, qk, _ = run.step(number)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        run.mark(*qk)
    assert not run.mask.all()


def test_select_is_what_a_first_step_leaves():
    layout = LAYOUTS["text-first"]
    run = Run(Skipping(-3, block_size=SIZE), layout)
    *_, (q, k, scale), _ = run.step(0)
    run.mark(q, k, scale)
    assert torch.equal(run.pattern.select(q, k, layout).to_token_mask(), run.mask)


def test_no_key_that_is_left_out_weighs_more_than_is_said():
    layout = LAYOUTS["video"]
    q, k, _ = inputs(layout, 0)
    for threshold in (-1, -4, -10):
        mask = Skipping(threshold, block_size=SIZE).select(q, k, layout).to_token_mask()
        weights = (q @ k.mT * 16**-0.5).softmax(-1)
        share = weights / weights.amax(-1, keepdim=True)
        assert share[~mask].max() <= 2.0**threshold
        assert mask.any(-1).all()


def test_equal_keys_are_all_kept():
    """Whose weights are all small, but none smaller than another."""
    layout = TokenLayout((1, 40, 50))
    q, k = torch.ones(2, 1, 1, layout.seq_len, 8)
    assert Skipping(-10).select(q, k, layout).density == 1


def test_outside_of_a_run_everything_is_computed():
    layout = LAYOUTS["text-last"]
    q, k, v = inputs(layout, 0)
    expected = attention(q, k, v, Dense(), layout)
    torch.testing.assert_close(attention(q, k, v, Skipping(-1), layout), expected, rtol=0, atol=1e-12)
    assert Skipping().density(layout) == 1


@pytest.mark.parametrize("threshold", [0, 3, math.nan, None, "low"])
def test_thresholds_that_mean_nothing(threshold):
    with pytest.raises(ValueError, match="`threshold` must be a number below 0"):
        Skipping(threshold)


def test_other_values_outside_their_forms():
    with pytest.raises(ValueError, match="`every`"):
        Skipping(every=0)
    with pytest.raises(ValueError, match="`reset`"):
        Skipping(reset=0)
    with pytest.raises(ValueError, match="block_size"):
        Skipping(block_size=(10, 8))
    assert Skipping(-10) == Skipping(-10.0) != Neighborhood(3)
