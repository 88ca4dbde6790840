"""FLUX.2: the masked dense transformer's output in both kinds of blocks, and reference images."""

import pytest
import torch
from dense_masks import close, mask_layers

from dit_accel import TokenLayout
from dit_accel.errors import UnavailableError
from dit_accel.patterns import Clear
from dit_accel.pipelines import family_named, family_of
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import disable, enable
from dit_accel.summary import summary

FAMILY = family_named("flux2")
CURVE = Recipe(Clear(3), order="hilbert")


def layout(grid=(8, 12), text_len=7, anchor=None):
    return TokenLayout((1, *grid), text_len=text_len, text_first=True, anchor=anchor)


def with_references(inputs: dict, *grids: tuple[int, int]) -> dict:
    """The inputs with random reference images behind the picture, numbered as the pipeline does it."""
    generator, ids = torch.Generator().manual_seed(4), []
    for i, (rows, columns) in enumerate(grids, start=1):
        ids.append(torch.cartesian_prod(*map(torch.arange, (1, rows, columns, 1))))
        ids[-1][:, 0] = 10 * i
    count, (batch, _, channels) = sum(map(len, ids)), inputs["hidden_states"].shape
    tokens = torch.randn(batch, count, channels, generator=generator)
    return inputs | {
        "img_ids": torch.cat([inputs["img_ids"], torch.cat(ids).expand(batch, -1, -1)], 1),
        "hidden_states": torch.cat([inputs["hidden_states"], tokens], 1),
    }


REFERENCES = {  # their token grids, and the layout's anchor
    "one": ([(5, 7)], (1, 5, 7)),
    "two-alike": ([(3, 4), (3, 4)], (2, 3, 4)),
    "three": ([(3, 4), (2, 5), (8, 12)], (1, 1, 118)),
}


class TestReferences:
    """Every token attends to them, and they to every token."""

    @pytest.mark.parametrize(("grids", "anchor"), REFERENCES.values(), ids=REFERENCES)
    def test_matches_masked_dense(self, flux2, masked, grids, anchor):
        pipe, ref = flux2.pipe, flux2.make().transformer
        inputs = with_references(flux2.inputs(pipe), *grids)
        mask_layers(ref, masked, Clear(3), layout(anchor=anchor))
        enable(pipe, CURVE)
        with torch.no_grad():
            expected = ref(**inputs)[0]
            close(pipe.transformer(**inputs)[0], expected)
            disable(pipe)
            assert not torch.allclose(pipe.transformer(**inputs)[0], expected, atol=1e-3)
        assert layout(anchor=anchor) == FAMILY.layout(pipe.transformer, inputs, {})

    def test_summary_names_them(self, flux2):
        inputs = with_references(flux2.inputs(flux2.pipe), (5, 7), (3, 4))
        enable(flux2.pipe, CURVE)
        with torch.no_grad():
            flux2.pipe.transformer(**inputs)
        expected = "grid 1 x 8 x 12 tokens + 7 text + 47 of reference images, attended densely"
        assert expected in str(summary(flux2.pipe))

    @pytest.mark.parametrize("change", ["missing", "shuffled", "of-reference"])
    def test_refuses_what_is_not_a_grid(self, flux2, change):
        ids = with_references(flux2.inputs(flux2.pipe), (5, 7))["img_ids"][0]
        ids = {"missing": ids[1:], "shuffled": ids.flip(0), "of-reference": ids[:-1]}[change]
        with pytest.raises(ValueError, match=r"this FLUX\.2 call are not full grids of tokens"):
            FAMILY.layout(flux2.pipe.transformer, flux2.inputs(flux2.pipe) | {"img_ids": ids}, {})

    def test_cached_references_are_refused(self, flux2):
        from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor

        inputs = flux2.inputs(flux2.pipe)
        enable(flux2.pipe, CURVE)
        with pytest.raises(ValueError, match=r"`kv_cache_mode` .* use Flux2KleinPipeline, or"):
            flux2.pipe.transformer(**inputs, kv_cache_mode="cached")
        disable(flux2.pipe)
        flux2.pipe.transformer.transformer_blocks[0].attn.set_processor(Flux2KVAttnProcessor())
        with pytest.raises(
            UnavailableError, match=r"Flux2KVAttnProcessor, .* instead of Flux2KleinKVPipeline"
        ):
            enable(flux2.pipe, CURVE)


def test_ids_are_read_once_per_run(flux2, monkeypatch):
    from dit_accel.pipelines.families import flux2 as module

    reads, read = [], module._grids
    monkeypatch.setattr(module, "_grids", lambda ids: reads.append(ids) or read(ids))
    enable(flux2.pipe, Clear(3))
    flux2.run(flux2.pipe, steps=4, cfg=2.0)
    assert len(reads) == 1


def test_family_of(flux2):
    assert family_of(flux2.pipe.transformer) is FAMILY
    assert list(FAMILY.layers(flux2.pipe.transformer)) == ["double.0", "double.1", "single.0", "single.1"]
