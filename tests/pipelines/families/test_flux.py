import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.patterns import Clear, Dense, Neighborhood
from dit_accel.pipelines import families, family_named, family_of, load
from dit_accel.pipelines.families.flux import grids_of_ids
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, enable

FAMILY = family_named("flux")
ORDERS = pytest.mark.parametrize("order", ["raster", "tile", "hilbert", "auto"])
PATTERNS = pytest.mark.parametrize("pattern", [Clear(3), Neighborhood((3, 5))], ids=["clear", "neighborhood"])


def layout(grid=(8, 12), text_len=7):
    return TokenLayout((1, *grid), text_len=text_len, text_first=True)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def under_masks(
    flux, masked, pattern, layers=None, grid=(8, 12), text_len=7, prepare=lambda pipe: None, **run
):
    """The untouched pipeline's output when diffusers' own attention gets the pattern's token mask."""
    pipe = flux.make()
    prepare(pipe)
    modules = FAMILY.layers(pipe.transformer)
    mask = pattern.token_mask(layout(grid, text_len))
    masked(modules, dict.fromkeys(layers or modules, mask))
    return flux.run(pipe, grid=grid, text_len=text_len, **run)


class TestMatchesMaskedDense:
    @ORDERS
    @PATTERNS
    def test_orders_and_patterns(self, flux, masked, pattern, order):
        with accelerated(flux.pipe, Recipe(pattern, order=order, block_size=(16, 16))):
            close(flux.run(flux.pipe), under_masks(flux, masked, pattern))

    @pytest.mark.parametrize(
        "run",
        [
            {"batch": 2, "cfg": 3.0},
            {"num_images_per_prompt": 2},
            {"grid": (5, 13)},
            {"grid": (16, 3), "text_len": 1},
            {"text_len": 40, "steps": 1},
        ],
        ids=lambda run: "-".join(f"{k}{v}" for k, v in run.items()).replace(" ", ""),
    )
    def test_runs(self, flux, masked, run):
        with accelerated(flux.pipe, Recipe(Clear(3), order="hilbert")):
            close(flux.run(flux.pipe, **run), under_masks(flux, masked, Clear(3), **run))

    def test_some_layers(self, flux, masked):
        layers = ["double.1", "single.0"]  # 1 and 2 in flat order
        with accelerated(flux.pipe, Recipe({"1-2": Clear(3), "single.1": Dense()}, order="hilbert")):
            close(flux.run(flux.pipe), under_masks(flux, masked, Clear(3), layers))

    def test_patterns_by_layer_and_head(self, flux, masked):
        other = Neighborhood((3, 5))
        recipe = Recipe(
            {"double": Clear(3), "single": other, "single.1/heads.1": Clear(2)}, block_size=(16, 16)
        )
        ref = flux.make()
        a, b, c = (p.token_mask(layout()) for p in (Clear(3), other, Clear(2)))
        masks = {"double.0": a, "double.1": a, "single.0": b, "single.1": torch.stack([b, c])}
        masked(FAMILY.layers(ref.transformer), masks)
        with accelerated(flux.pipe, recipe) as handle:
            close(flux.run(flux.pipe), flux.run(ref))
            d = [p.density(layout()) for p in (Clear(3), other, Clear(2))]
            assert handle.run_density == pytest.approx((2 * d[0] + d[1] + (d[1] + d[2]) / 2) / 4)

    def test_controlnet_residuals(self, flux, masked):
        inputs = flux.inputs(flux.pipe)
        torch.manual_seed(0)
        inputs["controlnet_block_samples"] = [torch.randn(1, 96, 32)]
        inputs["controlnet_single_block_samples"] = [torch.randn(1, 96, 32) for _ in range(2)]
        ref = flux.make().transformer
        mask = Clear(3).token_mask(layout())
        masked(FAMILY.layers(ref), dict.fromkeys(FAMILY.layers(ref), mask))
        enable(flux.pipe, Recipe(Clear(3), order="hilbert"))
        with torch.no_grad():
            close(flux.pipe.transformer(**inputs)[0], ref(**inputs)[0])
            positional = inputs.pop("hidden_states")
            out = flux.pipe.transformer(positional, **inputs | {"return_dict": True})
            close(out.sample, ref(positional, **inputs)[0])


class TestGrid:
    @pytest.mark.parametrize("grid", [(1, 1), (1, 7), (7, 1), (5, 9), (3, 300), (300, 2)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_reads_what_pipelines_pass(self, grid, dtype):
        from diffusers import FluxPipeline

        ids = FluxPipeline._prepare_latent_image_ids(1, *grid, "cpu", dtype)
        assert grids_of_ids(ids) == ((1, *grid), None)
        assert grids_of_ids(ids[None].expand(2, -1, -1)) == ((1, *grid), None)

    @pytest.mark.parametrize("grid", [(1, 1), (5, 9)])
    def test_reads_a_reference_image(self, grid):
        from diffusers import FluxPipeline

        ids, reference = (
            FluxPipeline._prepare_latent_image_ids(1, *g, "cpu", torch.bfloat16) for g in ((4, 6), grid)
        )
        reference[:, 0] = 1
        assert grids_of_ids(torch.cat([ids, reference])) == ((1, 4, 6), (1, *grid))

    @pytest.mark.parametrize("change", ["references", "missing", "shuffled"])
    def test_refuses_what_is_not_a_grid(self, change):
        from diffusers import FluxPipeline

        ids = FluxPipeline._prepare_latent_image_ids(1, 4, 6, "cpu", torch.float32)
        references = torch.cat([ids + torch.tensor([i, 0.0, 0.0]) for i in range(3)])
        ids = {"references": references, "missing": ids[:-1], "shuffled": ids.flip(0)}[change]
        with pytest.raises(ValueError, match=r"not one full grid of tokens, .*Kontext"):
            grids_of_ids(ids)

    def test_ids_are_read_once_per_run(self, flux, monkeypatch):
        from dit_accel.pipelines.families import flux as module

        reads = []
        monkeypatch.setattr(module, "grids_of_ids", lambda ids: reads.append(ids) or grids_of_ids(ids))
        enable(flux.pipe, Clear(3))
        flux.run(flux.pipe, steps=4, cfg=2.0)
        flux.run(flux.pipe, steps=4)
        assert len(reads) == 2


def test_family_of(flux, wan):
    assert family_of(flux.pipe.transformer).name == "flux"
    assert list(FAMILY.layers(flux.pipe.transformer)) == ["double.0", "double.1", "single.0", "single.1"]
    names = {family.name for family in families()}
    assert names > {"flux", "hunyuan-video", "hunyuan-video-1.5", "sd3", "skyreels-v2", "wan"}


def test_load_folder(flux, tmp_path):
    flux.pipe.save_pretrained(tmp_path / "model")
    parts = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipe = load(tmp_path / "model", **dict.fromkeys(parts))
    pipe.set_progress_bar_config(disable=True)
    close(flux.run(pipe), flux.run(flux.pipe))
    with pytest.raises(ValueError, match="is not a diffusers pipeline folder: it has no model_index"):
        load(tmp_path)
    for name in (tmp_path / "absent", "tiny-flx", "./absent/model", "a/b/c"):
        with pytest.raises(ValueError, match="neither a bundled model"):
            load(name)
