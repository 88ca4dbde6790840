"""Patterns that choose by content, in each family: the output of the specification, also of two samples."""

from dataclasses import replace

import pytest
import torch

from dit_accel.errors import UnavailableError
from dit_accel.patterns import (
    Agent,
    ChunkGrowth,
    Clustered,
    InLine,
    Pattern,
    Rectified,
    Routed,
    Skipping,
    SparseLinear,
    VideoSparse,
)
from dit_accel.pipelines import family_of
from dit_accel.recipe import adapter
from dit_accel.runtime.layer_inputs import layer_sizes
from dit_accel.runtime.switching import accelerated, enable

RUN = {"batch": 2, "cfg": 3.0, "steps": 3}
VIDEOS = (
    "wan", "hunyuan", "hunyuan15", "skyreels", "ltx", "cogvideox", "mochi", "ltx2", "animate",
    "chrono", "helios", "minimaxh3", "kandinsky5", "far",
)  # fmt: skip


def chosen_by_content(case, cell, pattern: Pattern, **options) -> None:
    """As by the reference, other than dense, the same again in another run, and gone after `disable`.

    Of AnyFlow-FAR refused, where the pattern is not made for its calls.
    """
    recipe = replace(case.recipe, attention=pattern, block_size=(16, 16), **options)
    if case.family == "far" and not isinstance(pattern, ChunkGrowth):
        refused = "does not take this recipe: .*use `ChunkGrowth`"
        with cell.refused(UnavailableError, refused, "its keys are of a cache"):
            enable(case.make(), recipe)
        return
    untouched = case.run(case.make(), **RUN)
    pipe = case.make()
    with accelerated(pipe, replace(recipe, backend="reference")):
        expected = case.run(pipe, **RUN)
    with accelerated(pipe, recipe):
        first = case.run(pipe, **RUN)
        case.close(first, expected)
        assert torch.equal(case.run(pipe, **RUN), first)
    assert torch.equal(case.run(pipe, **RUN), untouched)
    assert not torch.allclose(expected, untouched, atol=1e-4)


@pytest.mark.feature("Blocks routed by content (`Routed`)")
def test_routed(case, cell):
    chosen_by_content(case, cell, Routed(top_k=0.3, block_size=(16, 16), refresh=2))


@pytest.mark.feature("Clusters of tokens (`Clustered`)")
def test_clustered(case, cell):
    chosen_by_content(case, cell, Clustered(6, 8, top_p=0.3, least=0.1, iterations=(3, 1)))


@pytest.mark.feature("Growth of chunks (`ChunkGrowth`)", families=VIDEOS)
def test_chunk_growth(case, cell):
    chosen_by_content(case, cell, ChunkGrowth(1, 0.3, 0.1, top_frames=1, block_size=(16, 16)))


@pytest.mark.feature("Rescaled, with pooled values (`Rectified`)")
def test_rectified(case, cell):
    chosen_by_content(case, cell, Rectified(mass=0.2, neighbours=False, block_size=16))


@pytest.mark.feature("Skip bits that last for a run (`Skipping`)")
def test_skipping(case, cell):
    chosen_by_content(case, cell, Skipping(-0.05, block_size=(16, 16)))


def learned_by_chance(case, pattern: Pattern, folder):
    """An adapter of random weights that the pattern learns, for all layers."""
    transformer = case.make().transformer
    family, generator = family_of(transformer), torch.Generator().manual_seed(0)
    heads, head_dim = family.heads(transformer)
    places = {module: name for name, module in transformer.named_modules()}
    learned = {
        places[module]: {
            name: torch.randn(x.shape, generator=generator) / head_dim
            for name, x in pattern.learned(layer_sizes(family, module, heads, head_dim)).items()
        }
        for module in family.found_layers(transformer).values()
    }
    adapter.write_weights(folder, {}, learned=learned)
    return folder


def students(case, cell, patterns: list[Pattern], folder=None) -> None:
    """Patterns with the same learned weights, or none; Chroma's padded text would need their log-sum-exp."""
    adapted = {"adapter": learned_by_chance(case, patterns[0], folder)} if folder else {}
    for pattern in patterns:
        if case.family != "chroma":
            chosen_by_content(case, cell, pattern, **adapted)
            continue
        pipe, recipe = case.make(), replace(case.recipe, attention=pattern, **adapted)
        refused = r"mask of numbers.* `prompt_attention_mask` as booleans.* another pattern .*no lse"
        short = "padded text would need its log-sum-exp"
        with accelerated(pipe, recipe), cell.refused(UnavailableError, refused, short):
            pipe.transformer(**case.inputs())


@pytest.mark.feature("Sparse-linear attention with a learned projection (`SparseLinear`)")
def test_sparse_linear(case, cell, tmp_path):
    """In both forms."""
    forms = [SparseLinear(0.3, form, block_size=(16, 16)) for form in ("complement", "all")]
    students(case, cell, forms, tmp_path / "sla")


@pytest.mark.feature("Attention through agents (`Agent`)")
def test_agent(case, cell):
    students(case, cell, [Agent((1, 2, 2))])


@pytest.mark.feature("Linear attention with learned local kernels (`InLine`)")
def test_inline(case, cell, tmp_path):
    students(case, cell, [InLine()], tmp_path / "inline")


@pytest.mark.feature("Cubes, and their means by a learned gate (`VideoSparse`)")
def test_video_sparse(case, cell, tmp_path):
    students(case, cell, [VideoSparse(0.3, (1, 4, 4))], tmp_path / "vsa")
