"""AnyFlow-FAR against a dense formula in float64, in calls that read the cache of keys and that write it."""

import math
from dataclasses import replace

import pytest
import torch
from chunk_masks import chunk_mask, keys_of
from largest_mask import Largest
from torch.nn.attention.flex_attention import create_block_mask

from dit_accel import TokenLayout, calibrate, summary
from dit_accel.errors import UnavailableError
from dit_accel.guidance import HeadPerturbation
from dit_accel.masks.chunk_layout import ChunkLayout
from dit_accel.patterns import (
    ByNoise,
    ChunkCausal,
    ChunkGrowth,
    Clear,
    Dense,
    Neighborhood,
    Radial,
    Routed,
    SlidingTile,
)
from dit_accel.pipelines import family_of
from dit_accel.planning.plan import plan
from dit_accel.recipe.noise import NoiseRange
from dit_accel.recipe.recipe import Recipe, presets
from dit_accel.runtime.switching import accelerated, enable

CHUNKS, GRID = (1, 2, 2, 2, 1), (8, 4, 6)
SIZES = {"chunk_partition": CHUNKS, "full_chunk_limit": 3, "num_layers": 2}
NEAR = Neighborhood((3, 3, 3))
GROWTH = ChunkGrowth(2, 0.3, 0.1, top_frames=1, block_size=(16, 16))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


class Formula:
    """Attention of a pattern in float64: masks by loops over tokens, zeros filled up as the model does."""

    def __init__(self, pattern, zeros=True):
        self.whole, self.zeros, self.partition, self.kept = (
            pattern.token_mask(TokenLayout(GRID)),
            zeros,
            (),
            {},
        )

    def mask(self, writes):
        key = self.partition, writes
        if key not in self.kept:
            coarse = max(0, len(self.partition) - SIZES["full_chunk_limit"] + writes)
            self.kept[key] = chunk_mask(self.whole, GRID, self.partition, coarse, alone=not writes)
        return self.kept[key]

    def __call__(self, query, key, value, *, attn_mask, **_):
        mask = self.mask(writes=attn_mask is not None)
        more = -len(mask) % 128
        queries, keys = len(mask), mask.shape[1]
        assert (query.shape[1], key.shape[1]) == (queries + more, keys + more)
        assert not bool(key[:, keys:].any())
        if attn_mask is None and self.zeros:
            mask = torch.nn.functional.pad(mask, (0, more), value=True)
        q, k, v = (x.transpose(1, 2).double() for x in (query, key, value))
        q, k, v = q[:, :, :queries], k[:, :, : mask.shape[1]], v[:, :, : mask.shape[1]]
        scores = (q @ k.mT / math.sqrt(q.shape[3])).masked_fill(~mask, -torch.inf)
        out = torch.nn.functional.pad(scores.softmax(-1) @ v, (0, 0, 0, more))
        return out.transpose(1, 2).type_as(query)


def by_formula(pipe, monkeypatch, pattern, zeros=True):
    """A pipeline whose self-attention is the formula's."""
    formula = Formula(pattern, zeros)
    module = __import__(type(pipe.transformer).__module__, fromlist=["dispatch_attention_fn"])
    stock = module.dispatch_attention_fn

    def dispatch(query, key, value, backend=None, **options):
        own = backend == "flex"
        return (formula if own else stock)(query, key, value, **options)

    def note(module, args, kwargs):
        formula.partition = tuple(kwargs["chunk_partition"])

    monkeypatch.setattr(module, "dispatch_attention_fn", dispatch)
    pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    return pipe


RUN = {"grid": GRID, "steps": 2}


@pytest.mark.parametrize(
    ("pattern", "order"),
    [(Dense(), "tile"), (NEAR, "raster"), (NEAR, "tile"), (Radial(0.2, block_size=16), "hilbert"),
     (SlidingTile((1, 2, 1), (2, 2, 2)), "auto")],
    ids=str,
)  # fmt: skip
def test_matches_the_formula(far, monkeypatch, pattern, order):
    """Two samples, five chunks, of which the first two become coarse; keys of zeros are seen by all."""
    pipe, run = far.make(**SIZES), {**RUN, "batch": 2}
    stock, recipe = far.run(pipe, **run), Recipe(pattern, order=order, block_size=(32, 16))
    if pattern == Dense():  # kept as dense attention of ours: one head has a pattern that covers all
        recipe = replace(recipe, attention={"heads.0": Clear(60)})
    with accelerated(pipe, recipe):
        found = far.run(pipe, **run)
    assert torch.equal(far.run(pipe, **run), stock)
    with monkeypatch.context() as patch:
        close(found, far.run(by_formula(far.make(**SIZES), patch, pattern), **run))
    if pattern == Dense():
        close(found, stock)
        with monkeypatch.context() as patch:
            other = far.run(by_formula(far.make(**SIZES), patch, pattern, zeros=False), **run)
        assert not torch.allclose(other, found, atol=1e-3)
    else:
        assert not torch.allclose(found, stock, atol=1e-3)


def training_inputs() -> dict:
    """Of a call without a cache."""
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(1, 8, 4, 8, 12, generator=generator),
        "timestep": torch.full((1, 8), 500.0),
        "r_timestep": torch.full((1, 8), 300.0),
        "encoder_hidden_states": torch.randn(1, 5, 16, generator=generator),
        "chunk_partition": list(CHUNKS),
    }


def test_training_sees_three_chunks_in_full(far):
    """Without a cache all chunks are queries, chunk-causally, the first ones coarse."""
    transformer, inputs = far.make(**SIZES).transformer, training_inputs()
    with torch.no_grad():
        stock = transformer(**inputs)[0]
        with accelerated(transformer, Recipe(Clear(60), order="tile")) as handle:
            close(transformer(**inputs)[0], stock)
            layout = handle.bindings["transformer"].geometry.layout
            assert (layout.seq_len, layout.coarse, layout.zeros) == (3 * 6 + 5 * 24, 2, 0)
            with pytest.raises(UnavailableError, match=r"leave them out, or `dit_accel\.disable`"):
                transformer(**inputs, clean_hidden_states=inputs["hidden_states"])


def test_masks_of_other_chunks_are_refused(far):
    """Its own is known by the layout; another would be left out."""
    transformer = far.make(**SIZES).transformer
    inputs = training_inputs()
    own = {"height": 8, "width": 12, "chunk_partition": list(CHUNKS), "mode": "train"}
    others = [{"chunk_partition": [1, 1, 3, 2, 1]}, {"mode": "cache"}, {"width": 16}]
    masks = [transformer.build_attention_mask(**{**own, **other}) for other in others]
    with torch.no_grad(), accelerated(transformer, Recipe(Clear(60))):
        expected = transformer(**inputs)[0]
        mask = transformer.build_attention_mask(**own)
        assert torch.equal(transformer(**inputs, attention_mask=mask)[0], expected)
        window = create_block_mask(
            lambda b, h, q, k: (q - k).abs() < 50, None, None, *mask.seq_lengths, device="cpu"
        )
        for other in (*masks, window):
            with pytest.raises(ValueError, match="chunks; leave it out"):
                transformer(**inputs, attention_mask=other)
        with pytest.raises(ValueError, match="must be flex attention's, got Tensor"):
            transformer(**inputs, attention_mask=torch.ones(256, 256))


def test_compiled_blocks_write_the_cache_at_dense_steps(far):
    """Where flex attention's mask cannot be handed on: coarse chunks, two samples, all steps dense."""
    pipe, run = far.make(**SIZES), {**RUN, "batch": 2}
    stock = far.run(pipe, **run)
    with accelerated(pipe, Recipe(NEAR, dense_steps=1.0)):
        pipe.transformer.blocks[0].compile(fullgraph=True, backend="aot_eager")
        close(far.run(pipe, **run), stock)
    torch.compiler.reset()


# -- growth of chunks ----------


def expected_growth(pattern, q, k, layout):
    """One head's mask (S, K), by loops over blocks."""
    (bq, bk), chunks = pattern.block_size, layout.chunks
    keys = [chunk for chunk, _ in keys_of(GRID, chunks[: layout.present], layout.coarse)]
    queries = [chunk for chunk in keys if chunk == layout.present - 1] if layout.last_alone else keys
    sizes = layout.frame_tokens
    frame_of = [frame for frame, size in enumerate(sizes) for _ in range(size)]
    chunk_of_frame = [chunk for chunk, n in enumerate(chunks) for _ in range(n)]
    means = [k[[t for t, own in enumerate(frame_of) if own == f]].mean(0) for f in range(len(sizes))]
    shares = pattern._densities(list(chunks))
    mask = torch.tensor([[mine >= other for other in keys] + [True] * layout.zeros for mine in queries])
    for i in range(0, len(queries), bq):
        first, last = queries[i], queries[min(i + bq, len(queries)) - 1]
        mean = q[[t for t, own in enumerate(queries) if own == last]].mean(0)
        before = [f for f in range(len(sizes)) if chunk_of_frame[f] < last]
        before.sort(key=lambda f: -float(mean @ means[f]))
        always = [f for f in before if f == 0 or chunk_of_frame[f] == last - 1]
        kept = {*before[: pattern.top_frames], *always}
        past = [j for j in range(0, len(keys), bk) if all(chunk < first for chunk in keys[j : j + bk])]
        able = [j for j in past if kept & set(frame_of[j : j + bk])]
        able.sort(key=lambda j: -float(q[i : i + bq].mean(0) @ k[j : j + bk].mean(0)))
        for j in set(past) - set(able[: round(shares[last] * len(past))]):
            mask[i : i + bq, j : j + bk] = False
    return mask


CALLS = {
    "read": {"present": 5, "coarse": 2, "last_alone": True, "zeros": 104},
    "write": {"present": 4, "coarse": 2},
    "first": {"present": 1, "last_alone": True, "zeros": 104},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_growth_by_loops(call):
    layout = ChunkLayout(GRID, chunks=CHUNKS, **call)
    generator = torch.Generator().manual_seed(0)
    lengths = (layout.seq_len, layout.kv_len)
    q, k = (torch.randn(2, 2, n, 16, generator=generator, dtype=torch.float64) for n in lengths)
    k[:, :, layout.tokens :] = 0
    mask = GROWTH.select(q, k, layout)
    mask.validate()
    allowed = mask.to_token_mask()
    if allowed.ndim == 2:
        allowed = allowed.expand(2, 2, -1, -1)
    heads = [[expected_growth(GROWTH, q[b, h], k[b, h], layout) for h in (0, 1)] for b in (0, 1)]
    assert torch.equal(allowed, torch.stack([torch.stack(row) for row in heads]))
    assert allowed.double().mean() <= GROWTH.density(layout) + 1e-9
    if layout.last_alone:
        assert bool(allowed[..., -layout.seq_len - layout.zeros :].all())  # its own chunk, and zeros


def test_growth_in_a_pipeline(far):
    """As by the reference, less than all, in summaries too; the first chunk has no past to leave out."""
    pipe, run = far.make(**SIZES), {**RUN, "cfg": 3.0}
    stock = far.run(pipe, **run)
    with accelerated(pipe, Recipe(GROWTH)) as handle:
        found = far.run(pipe, **run)
        assert handle.stats()["density"] < 0.9
        text = str(summary(pipe))
    with accelerated(pipe, Recipe(GROWTH, backend="reference")):
        close(found, far.run(pipe, **run))
    assert torch.equal(far.run(pipe, **run), stock)
    close(found[:, :, :1], stock[:, :, :1])
    assert not torch.allclose(found[:, :, 3:], stock[:, :, 3:], atol=1e-3)
    assert "chunk 5 of 5: 24 queries, 242 keys" in text
    assert "chosen by content" in text


@pytest.mark.parametrize("pattern", [NEAR, GROWTH], ids=["static", "growth"])
def test_int8_under_the_cache(far, pattern):
    """As by the reference, which rounds likewise, and near what is not rounded."""
    pipe, found = far.make(**SIZES), {}
    for name, options in {"not": {}, "int8": {"quantization": "int8"}}.items():
        for backend in ("auto", "reference"):
            with accelerated(pipe, Recipe(pattern, backend=backend, **options)):
                found[name, backend] = far.run(pipe, **RUN)
    close(found["int8", "auto"], found["int8", "reference"])
    exact = found["not", "auto"]
    assert 0 < (found["int8", "auto"] - exact).norm() / exact.norm() < 0.05


def test_growth_names_the_chunks_of_the_model(far):
    pipe = far.make(**SIZES)
    with accelerated(pipe, ChunkGrowth(3)), pytest.raises(ValueError, match="use frames_per_chunk=2"):
        far.run(pipe, **RUN)


def test_chunks_that_are_not_the_config_s(far):
    """The cache tells them: their number and the longest."""
    pipe = far.make(**{**SIZES, "chunk_partition": (1, 3, 3)})
    run, other = {"grid": (7, 4, 6), "steps": 1, "chunk_partition": [1, 2, 2, 2]}, far.make(**SIZES)
    with accelerated(pipe, GROWTH) as handle:
        found = far.run(pipe, **run)
        assert handle.bindings["transformer"].geometry.layout.chunks == (1, 2, 2, 2)
    other.transformer.register_to_config(chunk_partition=(1, 2, 2, 2))
    with accelerated(other, GROWTH):
        assert torch.equal(far.run(other, **run), found)
    with accelerated(pipe, ChunkGrowth(3)), pytest.raises(ValueError, match="use frames_per_chunk=2"):
        far.run(pipe, **run)
    with accelerated(pipe, NEAR):  # of three frames, more than the first chunk has
        far.run(pipe, **{**run, "grid": (6, 4, 6), "chunk_partition": [2, 2, 2]})


def test_the_preset_is_of_the_published_chunks(far):
    pipe, (int8, recipe) = far.make(chunk_partition=(1, 3, 2)), presets("anyflow-far").values()
    assert (int8.attention, int8.quantization) == (recipe.attention, "int8")
    with accelerated(pipe, recipe.name) as handle:
        far.run(pipe, grid=(6, 4, 6), steps=1)
        assert handle.run_density <= 1
    assert recipe.attention.frames_per_chunk == 3


# -- calls ----------


def test_a_run_is_a_chunk_and_writing_the_cache_is_of_its_last_step(far):
    """Dense steps are the first of each chunk; its last one counts for the call that writes."""
    pipe, seen = far.make(**SIZES), []
    recipe = Recipe(NEAR, dense_steps=1)
    with accelerated(pipe, recipe) as handle:
        binding = handle.bindings["transformer"]
        tick = binding.steps.tick

        def note(timestep, between, kept):
            seen.append((between, tick(timestep, between, kept)))
            return seen[-1][1]

        binding.steps.tick = note
        far.run(pipe, **RUN)
        stats = handle.stats()
    assert [(between, one.step) for between, one in seen] == [(False, 0), (False, 1), (True, 1)] * 4 + [
        (False, 0),
        (False, 1),
    ]
    assert len({one.run for _, one in seen}) == len(CHUNKS)
    assert (stats["steps"], stats["dense_steps"]) == (2, [0])


@pytest.mark.parametrize("dense_steps", [0, 1, 0.5, {-1}, NoiseRange(0.7, 1)], ids=str)
def test_given_frames_are_written_alike_in_every_run(far, dense_steps):
    """Before any step: in a run of their own, of one step, whatever ran before."""
    pipe, seen = far.make(**SIZES), []
    given = torch.randn(1, 3, 4, 8, 12, generator=torch.Generator().manual_seed(9))
    with accelerated(pipe, Recipe(NEAR, dense_steps=dense_steps)) as handle:
        steps = handle.bindings["transformer"].steps
        tick = steps.tick
        steps.tick = lambda *call: seen.append(tick(*call)) or seen[-1]
        first = far.run(pipe, **RUN, video_latents=given)
        number = len(seen)
        far.run(pipe, **RUN)
        del seen[number:]
        assert torch.equal(far.run(pipe, **RUN, video_latents=given), first)
    for run in (seen[:number], seen[number:]):
        assert [(one.step, one.total) for one in run] == [(0, 1)] * 2 + [(0, 2), (1, 2), (1, 2)] * 2 + [
            (0, 2),
            (1, 2),
        ]
        assert len({one.run for one in run}) == 1 + 3


def test_by_noise_level(far):
    pipe = far.make(**SIZES)
    stock = far.run(pipe, **RUN)
    with accelerated(pipe, ByNoise({0.7: Dense(), 0: NEAR})) as handle:
        assert not torch.allclose(far.run(pipe, **RUN), stock, atol=1e-3)
        assert handle.stats()["step_densities"] == {0: 1.0, 1: pytest.approx(NEAR.density(last_call()))}


def last_call():
    return ChunkLayout(GRID, chunks=CHUNKS, present=5, coarse=2, last_alone=True, zeros=104, padding=104)


def test_attention_that_writes_the_cache_makes_no_mask_of_tokens(far):
    """The pipeline makes flex attention's own before; of 114 tokens ours stay below 114 x 114."""
    pipe, calls = far.make(**SIZES), []
    note = lambda module, args, kwargs: calls.append(kwargs)  # noqa: E731
    with pipe.transformer.register_forward_pre_hook(note, with_kwargs=True, prepend=True):
        far.run(pipe, **RUN)
    (write,) = [c for c in calls if c["kv_cache_flag"]["is_cache_step"] and len(c["chunk_partition"]) == 4]
    with torch.no_grad(), accelerated(pipe.transformer, Recipe(NEAR, guard=False)):
        pipe.transformer(**write)
        with Largest() as largest:
            pipe.transformer(**write)
    assert largest.elements < 114**2 / 2


def test_what_is_refused(far):
    pipe = far.make(**SIZES)
    refused = {
        Recipe(NEAR, tail="pooled"): "would let chunks see frames to come",
        Recipe(NEAR, guidance=HeadPerturbation([(0, 0)])): "would need another; use guidance=None",
        Recipe(Routed(top_k=0.5)): "takes queries and keys for the same tokens.*use `ChunkGrowth`",
        Recipe(Clear(3, downsample=2)): "pools keys of whole grids",
        Recipe(ChunkCausal(2)): "hides frames to come, as the model itself does",
        Recipe(ByNoise({0.5: Dense(), 0: Routed(top_k=0.5)})): "takes queries and keys for the same tokens",
        Recipe(replace(GROWTH, window=4)): "its chunks see all before them; use window=None",
    }
    for recipe, reason in refused.items():
        with pytest.raises(UnavailableError, match=f"does not take this recipe: .*{reason}"):
            enable(pipe, recipe)
    assert not any(
        type(block.attn1.processor).__name__.startswith("Acc") for block in pipe.transformer.blocks
    )


def test_calibration_and_perturbed_heads_are_refused(far):
    """Before a run."""
    with pytest.raises(UnavailableError, match=r"cannot be calibrated: .*cache.*use `ChunkGrowth`"):
        calibrate(far.pipe, "a circle", density=0.3)
    with pytest.raises(UnavailableError, match="would need another; use guidance=None"):
        enable(far.pipe, Recipe(Dense(), guidance=HeadPerturbation([(0, 0)])))


def test_another_attention_backend_is_refused_as_by_diffusers(far):
    pipe = far.make(**SIZES)
    with accelerated(pipe, NEAR):
        for block in pipe.transformer.blocks:
            block.attn1.processor._attention_backend = "native"
        with pytest.raises(ValueError, match="requires the 'flex' attention backend"):
            far.run(pipe, **RUN)


def test_plan():
    """Of the last chunk of 81 frames: five chunks are coarse, two of them and itself in full."""
    answer = plan(
        "anyflow-far-chunk-growth", family="anyflow-far", variant="anyflow-far-1.3b", size=(256, 128)
    )
    layout = answer.layout
    assert layout.chunks == (1, 3, 3, 3, 3, 3, 3, 2)
    assert (layout.coarse, layout.seq_len, layout.tokens) == (5, 2 * 128, 13 * 32 + 8 * 128)
    assert answer.density < 0.5
    assert any("of a step of the last chunk" in note for note in answer.notes)
    pairs = 4 * 1536 * layout.seq_len * layout.kv_len
    assert answer.flops.layers["blocks.0"] == pairs


def test_family(far):
    family = family_of(far.pipe.transformer)
    assert family.name == "anyflow-far"
    assert list(family.layers(far.pipe.transformer)) == ["blocks.0", "blocks.1", "blocks.2"]
    assert list(family.text_layers(far.pipe.transformer)) == [f"blocks.{i}.attn2" for i in range(3)]
