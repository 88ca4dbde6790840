"""How a model family is described: its layers, the geometry of a call, where tokens come and go."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dit_accel.attention.call import LayerAttention
from dit_accel.errors import UnavailableError
from dit_accel.json_files import read_json
from dit_accel.masks.layout import TokenLayout

from .processors import Accelerated, Reused, not_reusable
from .tokens import Permute, move_part

if TYPE_CHECKING:
    from dit_accel.recipe.recipe import Recipe

Fill = Callable[..., torch.Tensor]  # (*shape) -> a tensor of this shape


@dataclass(frozen=True)
class HeadSearch:
    """What a search for the heads that guide best (`dit-accel hunt`) takes where nothing is asked for.

    Attributes:
        scale: of perturbation guidance.
        steps: sampler steps; None: as the model's pipeline.
        side: of a square picture in pixels; None: as the model's pipeline.
    """

    scale: float = 3.0
    steps: int | None = None
    side: int | None = None


class Family:
    """What only this model family knows. One instance per family, without state.

    Attributes:
        name: as in presets and selectors' documentation.
        transformer: class name of the transformers it describes.
        variants: of other classes that are the same to it.
        originals: class names of the attention processors that accelerated ones can stand in for.
        processor: of accelerated layers, a copy of the original's own code where it is a `Reused`; None: such
            a copy.
        accelerates_dense: whether a layer under `Dense()` is accelerated as well, where diffusers' own
            processor wastes memory.
        stays_dense: what of the model's attention no recipe makes sparse, in words; empty: not known.
        text_name: what the tokens are that a layout has as its text, where they are not that.
        moves_tokens: whether tokens are laid out where they enter the transformer; if not, in each layer.
        video: whether its models make videos.
        whole_latents: the frames that a video has beside whole chunks of those per latent, their latents, and
            the latents of a chunk.
        head_search: defaults of a search for heads.
        highres_refusal: why runs above native size (`dit_accel.highres`) cannot be made; None: they can.
        upscaled_shift: of the noise schedule in passes above native size; None: as the pipeline's.
        planned_call: which call of a run plans are of, where calls differ in tokens; empty: all are alike.
        batches_guidance: whether pipelines batch conditional and unconditional samples in one call.
        parallel_refusal: why calls cannot be shared by context parallelism; None: they can, see
            `parallel_plan`.
        split_together: whether that plan splits all tokens of a layout as one stream; if not, visual tokens
            (with those of references behind them) and text each by itself.
        gathered_per_layer: how often that plan joins all tokens again in a layer.
        band_dim: dimension of the output along which bands of rows of the picture stand one after the other;
            None: rows cannot be told apart outside (see `band`).
        hidden_config: values that a transformer's forward must see in its configuration in accelerated calls,
            as our masks take the place of what it makes of the real ones.
        beside: what the tokens are that calls have beside picture and text, the layout's anchor, which are
            attended densely.
        shared_inputs: names of inputs of the transformer's forward that all samples of a call share, as they
            say where tokens are; `text_places` are those of them that say it of text.
        pure_noise: the timestep that its transformers take for pure noise, noise level 1 of the flow; 0
            where they rise from it to `clean`; None: not known.
        clean: the timestep without noise where they rise.
        toward_data: whether its transformers predict latents less noise, and not noise less latents.
        listed_inputs: names of inputs of the transformer's forward that are lists of one entry a sample.
        denoised_inputs: names of those that hold nothing but what is denoised, and its timestep.
        distillation_refusal: why its models cannot be distilled (`dit_accel.distill`); None: they can.
        calibration_refusal: why its heads cannot be calibrated (`dit_accel.calibrate`); None: they can.
        encodes: whether `dit_accel.latents.encoded` makes of pictures what its pipelines denoise.
        projections: what its layers call their linear layers, by the names that most models have for them.
    """

    name: str
    transformer: str
    variants: tuple[str, ...] = ()
    originals: tuple[str, ...]
    processor: type[Accelerated] | None = None
    accelerates_dense: bool = False
    stays_dense: str = ""
    text_name: str = "text"
    moves_tokens: bool = True
    parallel_refusal: str | None = "there is no plan of what is split where"
    split_together: bool = False
    gathered_per_layer: int = 0
    band_dim: int | None = None
    hidden_config: Mapping[str, Any] = MappingProxyType({})
    beside: str = "of a reference image"
    shared_inputs: tuple[str, ...] = ()
    text_places: tuple[str, ...] = ()
    pure_noise: float | None = 1000.0
    clean: float = 1000.0
    toward_data: bool = False
    listed_inputs: tuple[str, ...] = ()
    denoised_inputs: tuple[str, ...] = ("hidden_states", "timestep")
    distillation_refusal: str | None = None
    calibration_refusal: str | None = None
    encodes: bool = False
    projections: Mapping[str, str] = MappingProxyType({})

    def matches(self, transformer: Any) -> bool:
        named = (self.transformer, *self.variants)
        return any(cls.__name__ in named for cls in type(transformer).__mro__)

    def heads(self, transformer: Any) -> tuple[int, int]:
        """The number of heads of its layers, and their dimension."""
        return int(transformer.config.num_attention_heads), int(transformer.config.attention_head_dim)

    def latents(self, inputs: dict[str, Any]) -> torch.Tensor:
        """What is denoised, or that of the first sample, from the inputs of the transformer's forward."""
        return inputs["hidden_states"]

    def timestep(self, inputs: dict[str, Any]) -> torch.Tensor | float:
        """The timestep of a call, which falls from step to step."""
        return inputs["timestep"]

    def predicted(self, sample: Any) -> torch.Tensor:
        """The prediction (B, ...) in the sample of a forward's output."""
        return sample

    def layers(self, transformer: Any) -> dict[str, nn.Module]:
        """Attention modules by layer name, in flat order."""
        raise NotImplementedError

    def found_layers(self, transformer: Any) -> dict[str, nn.Module]:
        """The same, checked.

        Raises:
            UnavailableError: blocks that are not where this family has them.
        """
        try:
            layers = self.layers(transformer)
            missing = next(
                (name for name, module in layers.items() if not hasattr(module, "processor")), None
            )
        except AttributeError as error:
            missing = str(error)
        if missing is None:
            return layers
        raise UnavailableError(
            f"the blocks of this {type(transformer).__name__} are not those of diffusers ({missing}): "
            "something has wrapped or replaced them; enable first and wrap after that, or unwrap them"
        )

    def blocks(self, transformer: Any) -> tuple[nn.ModuleList, ...]:
        """The lists of blocks, in the order in which they run; those of `layers`, each the next ones."""
        raise NotImplementedError

    def rotary_module(self, transformer: Any) -> nn.Module | None:
        """The module that makes the cosines and sines of the rotary embedding; None: there is none."""
        return None

    def rotary_axes(self, transformer: Any, args: tuple) -> list[tuple[torch.Tensor, int]]:
        """In a call of that module, positions (S,) on each axis (frame, row, column), and its dimension."""
        raise NotImplementedError

    def text_layers(self, transformer: Any) -> dict[str, nn.Module]:
        """Cross-attention modules to text by layer name; empty where text is a part of joint attention."""
        return {}

    def conditional(self, pipeline: Any, inputs: dict[str, Any]) -> slice:
        """Which samples of a conditional call of `pipeline` (None: not known) are conditional.

        Where pipelines batch classifier-free guidance it is the second half; both halves then hold the same
        latents. A loop of one's own is taken at that, a pipeline that runs without guidance is not.
        """
        latents = inputs["hidden_states"]
        half = len(latents) // 2
        guided = self.batches_guidance and getattr(pipeline, "do_classifier_free_guidance", True)
        if guided and len(latents) == 2 * half and torch.equal(latents[:half], latents[half:]):
            return slice(half, 2 * half)
        return slice(0, len(latents))

    def denoised(self, transformer: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """What a call denoises, of all samples (B, ...), without what stands beside it in the same input."""
        return inputs["hidden_states"]

    def with_denoised(
        self, inputs: dict[str, Any], latents: torch.Tensor, timestep: torch.Tensor
    ) -> dict[str, Any]:
        """Other inputs of a call with what it denoises, as of `denoised`, and timesteps, as of `timestep`."""
        return inputs | {"hidden_states": latents, "timestep": timestep}

    def with_other_text(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs of a call, without what it denoises, whose text is that of another, made to fit it."""
        return inputs

    def layout(self, transformer: Any, inputs: dict[str, Any], memo: dict) -> TokenLayout:
        """The geometry of a call, from the inputs of the transformer's forward.

        `memo` keeps what is costly to read until the next call.

        Raises:
            ValueError: tokens that are not one full grid.
        """
        raise NotImplementedError

    def text_valid(self, inputs: dict[str, Any], memo: dict) -> torch.Tensor | None:
        """Number of valid text tokens of each sample, integer (B,); None where text is never padded.

        Raises:
            ValueError: padding that does not come last.
        """
        return None

    def around(
        self, attentions: dict[str, LayerAttention], inputs: dict[str, Any], memo: dict
    ) -> dict[str, LayerAttention]:
        """What sparse layers compute in a call, by layer name, with what the model does beside a mask."""
        return attentions

    def chunk_frames(self, transformer: Any, inputs: dict[str, Any]) -> int | None:
        """Frames of a chunk where each frame has its own timestep (diffusion forcing), otherwise None.

        Tokens then stay in their frame and, where chunks are of more than one frame, attend to their own
        chunk and to earlier ones.

        Raises:
            ValueError: chunks that do not fill the video.
        """
        return None

    def recipe_refusal(self, recipe: Recipe) -> str | None:
        """Why a recipe cannot be enabled on its models, naming option, reason and remedy, or None."""
        return None

    def between_steps(self, inputs: dict[str, Any]) -> bool:
        """Whether a call prepares later steps without predicting: then it is counted with the latest step."""
        return False

    def kept_between(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """What all calls of one generation have in common and no others, where some are between steps."""
        return None

    def leading(self, transformer: Any, layout: TokenLayout) -> int:
        """How many visual tokens must stay first in every order, as the model tells them by their place."""
        return 0

    def enter(self, transformer: Any, inputs: dict[str, Any], layout: TokenLayout, permute: Permute) -> dict:
        """The inputs with everything that has a place per visual token permuted."""
        raise NotImplementedError

    def leave(
        self, transformer: Any, sample: torch.Tensor, layout: TokenLayout, restore: Permute
    ) -> torch.Tensor:
        """The transformer's output back in its own order."""
        raise NotImplementedError

    def placed_outputs(self, transformer: Any) -> dict[nn.Module, int | tuple[int, int]]:
        """Modules inside whose output must be permuted as well, such as tables of the rotary embedding.

        Each with the dimension of the visual tokens in its output, a tensor or a tuple of tensors. Those hold
        the visual tokens alone, or all tokens of the layout. Where frames, rows and columns are dimensions of
        their own: the first and the last of them.
        """
        return {}

    def move_placed(
        self, output: Any, dim: int | tuple[int, int], layout: TokenLayout, permute: Permute
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """The output of such a module with its visual tokens permuted along `dim`."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            if isinstance(dim, tuple):
                return permute(tensor.flatten(*dim), dim[0]).view(tensor.shape)
            alone = tensor.shape[dim] == layout.visual_len  # without the other tokens of the layout
            return permute(tensor, dim) if alone else move_part(tensor, dim, layout.visual_slice, permute)

        return moved(output) if isinstance(output, torch.Tensor) else tuple(map(moved, output))

    def parallel_plan(self, transformer: Any) -> dict[str, Any] | None:
        """Which tokens are split where, as `enable_parallelism(cp_plan=...)` takes it; None: no plan."""
        return getattr(transformer, "_cp_plan", None) if self.parallel_refusal is None else None

    def exchanging(self, transformer: Any) -> list[nn.Module]:
        """Attention modules beside `layers` whose keys the plan splits: they exchange by diffusers' code."""
        return []

    def not_parallel(self, transformer: Any, inputs: dict[str, Any]) -> str | None:
        """Why a call with these inputs cannot be split by the plan, with the remedy, or None."""
        residuals = (
            "controlnet_block_samples",
            "controlnet_single_block_samples",
            "block_controlnet_hidden_states",
        )
        named = next((name for name in residuals if inputs.get(name) is not None), None)
        return (
            named and f"`{named}` are of all tokens, and no plan splits them; use one process with ControlNet"
        )

    def band(self, inputs: dict[str, Any], layout: TokenLayout, rows: range) -> dict[str, Any]:
        """The inputs of a call with these rows of the picture's tokens alone; only with a `band_dim`."""
        raise NotImplementedError

    def layer_layout(self, name: str, layout: TokenLayout) -> TokenLayout:
        """The geometry of one layer of a call, where layers differ; visual tokens are the same in all."""
        return layout

    def query_projection(self, module: nn.Module) -> nn.Module | None:
        """The linear layer of an attention module that makes its queries, or more; None: none is known.

        Its input has the visual tokens first, or all tokens of the layer's layout.
        """
        names = ("to_q", "to_query", "to_qkv_mlp_proj")
        return next((part for name in names if (part := getattr(module, name, None)) is not None), None)

    def refusal(self, module: nn.Module) -> str | None:
        """Why `processor` cannot stand in for this module's processor, with the remedy, or None."""
        original = type(module.processor).__name__
        if original in self.originals:
            reused = self.processor is None or issubclass(self.processor, Reused)
            reason = not_reusable(type(module.processor)) if reused else None
            return reason and f"has the attention processor {original}, which {reason}; update diffusers"
        return (
            f"has the attention processor {original}, which accelerated layers cannot stand in for (only "
            f"{', '.join(self.originals)}); unload what installed it (such as an IP-Adapter), or make the "
            "layer dense"
        )

    # -- what is known before a run: for plans, benchmarks and searches without weights ----------------------

    video: bool = False
    whole_latents: tuple[int, int, int] = (1, 1, 1)
    head_search: HeadSearch = HeadSearch()
    highres_refusal: str | None = None
    upscaled_shift: float | None = None
    planned_call: str = ""
    batches_guidance: bool = False

    def published(self) -> list[dict[str, Any]]:
        """Published models, the family's reference first: `published/<name>.json` beside its module.

        Each has the fields of `dit_accel.planning.model_config.ModelConfig`, its family left out. Empty where
        there is no such file.
        """
        path = Path(inspect.getfile(type(self))).parent / "published" / f"{self.name}.json"
        return read_json(path) if path.is_file() else []

    def patch(self, config: Any) -> tuple[int, int, int]:
        """Latents per token along frames, rows and columns, by the transformer's `config`."""
        return getattr(config, "patch_size_t", 1), config.patch_size, config.patch_size

    def planned_layout(self, grid: tuple[int, int, int], text_len: int) -> TokenLayout:
        """The geometry that `layout` will read from a call with this token grid and this much text."""
        return TokenLayout(grid, text_len=text_len)

    def example_inputs(
        self, config: Any, grid: tuple[int, int, int], text_len: int, fill: Fill
    ) -> dict[str, Any]:
        """Inputs of the transformer's forward for one sample, each made by `fill` where any values will do.

        Args:
            config: the transformer's.
            grid: token grid (F, H, W).
            text_len: text tokens.
            fill: makes a tensor of a shape, on the device and in the number format of the call.
        """
        raise NotImplementedError

    def countable(self, transformer: Any) -> AbstractContextManager[Any]:
        """Within it forwards can be run on the meta device, where FLOPs are counted."""
        return nullcontext()

    def with_reference(
        self, inputs: dict[str, Any], grid: tuple[int, int, int], fill: Fill
    ) -> dict[str, Any]:
        """Such inputs with the tokens of a reference image (F, H, W) behind those of the picture.

        Raises:
            ValueError: a family of which no model takes one.
        """
        raise ValueError(f"no model of the family {self.name!r} takes a reference image")

    def reference_grid(self, pipeline: str) -> tuple[int, int, int] | None:
        """Token grid of the reference image that a pipeline of this class usually takes; None: of none."""
        return None

    def vae_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Frames and pixels (along a side) per latent, from an autoencoder's config as pipelines read it."""
        if not self.video:
            return 1, 2 ** (len(config["block_out_channels"]) - 1)
        frames = config.get("scale_factor_temporal") or config.get("temporal_compression_ratio") or 4
        return frames, config.get("scale_factor_spatial") or config.get("spatial_compression_ratio") or 8

    def prompt_tokens(self, folder: Path, longest: int | None) -> int | None:
        """Text tokens of a prompt in a pipeline folder, padding included; None: as of its published models.

        Args:
            folder: of a diffusers pipeline.
            longest: `max_sequence_length` of its calls; None: the pipeline's default.
        """
        return longest


def double_and_single(transformer: Any) -> dict[str, nn.Module]:
    """Attention modules by layer name of a transformer with double-stream, then single-stream blocks."""
    double = {f"double.{i}": block.attn for i, block in enumerate(transformer.transformer_blocks)}
    single = {f"single.{i}": block.attn for i, block in enumerate(transformer.single_transformer_blocks)}
    return double | single


def double_and_single_blocks(transformer: Any) -> tuple[nn.ModuleList, ...]:
    """The blocks of the same."""
    return transformer.transformer_blocks, transformer.single_transformer_blocks
