"""What all families share: how a family is described, and the attention processor of an accelerated layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from dit_accel.blockmask import BlockMask
from dit_accel.choice import HeadChoice, Sample
from dit_accel.kernels import block_sparse_attention
from dit_accel.layout import TokenLayout

if TYPE_CHECKING:
    from dit_accel.guidance.branch import LayerPerturbation

DENSE = "dense"
_TENSORS_KEPT = 4
Permute = Callable[
    [torch.Tensor, int], torch.Tensor
]  # (tensor, dimension of the visual tokens) -> same, reordered


class SparseProcessor:
    """Attention processor of one layer: block-sparse, or the layer's original processor at dense steps.

    A family fills in `project` and `output`. `route` says what this forward does: a `BlockMask`, a
    `HeadChoice` (by `sample`; `temporal` then tells what was chosen), `DENSE`, or None between forwards.
    `perturb` stands for the perturbed branch of guidance: it changes the output of some heads.
    `text_valid` (B,) stands for the `attention_mask` of families with padded text: how many text tokens of
    each sample are valid. Projections go through the layer's own modules, so LoRA and quantized weights take
    part. Everything stays in *kernel order*: visual tokens (already permuted where they entered the
    transformer), then text.
    """

    def __init__(self, original: Any, backend: str = "auto"):
        self.original = original
        self.backend = backend
        self.route: BlockMask | HeadChoice | str | None = None
        self.sample: Sample | None = None
        self.temporal: torch.Tensor | None = None
        self.layout: TokenLayout | None = None
        self.text_valid: torch.Tensor | None = None
        self.perturb: LayerPerturbation | None = None

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        if self.route is None:
            raise RuntimeError(
                "an accelerated attention layer was called outside its transformer's call; call the "
                "transformer itself (not its `forward`, its blocks, or a backward pass with gradient "
                "checkpointing, which calls them again), or `dit_accel.disable` it first"
            )
        if isinstance(self.route, str) and self.perturb is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if attention_mask is not None and self.text_valid is None:
            raise ValueError(
                "an `attention_mask` is not supported in accelerated layers; make this layer or step dense"
            )
        if self._parallel_config is not None:
            raise ValueError(
                "context parallelism is not supported in accelerated layers; `dit_accel.disable` it first"
            )
        projected = self.project(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        q, k, v = (x.transpose(1, 2) for x in projected)
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device):  # as PyTorch's attention; norms give q and k in float32
            q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
        out = self.attend(q, k, v) if self.perturb is None else self.perturb(self, q, k, v)
        return self.output(attn, out.transpose(1, 2).flatten(2), encoder_hidden_states)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None = None,
        heads: list[int] | None = None,
    ) -> torch.Tensor:
        """Attention as `route` says, (B, H, S, D) like q, k and v in kernel order; or of some `heads` alone.

        Those are attended once more in a call: where heads choose by content, they keep their choice.
        """
        options = {"text_valid": self.text_valid, "backend": self.backend}
        if isinstance(self.route, HeadChoice) and heads is None:
            out, self.temporal = self.route.attend(q, k, v, self.sample, **options)
            return out
        if isinstance(self.route, HeadChoice):
            options |= {"scale": scale, "temporal": self.temporal}
            return self.route.attend(q, k, v, self.sample, **options)[0][:, heads]
        differ = isinstance(self.route, BlockMask) and self.route.head_groups is not None
        if heads is not None and differ:
            return self.attend(q, k, v, scale)[:, heads]
        if heads is not None:
            q, k, v = (x[:, heads] for x in (q, k, v))
        if isinstance(self.route, BlockMask):
            return block_sparse_attention(q, k, v, self.route, scale=scale, **options)
        hidden = self.hidden_keys()
        mask = None if hidden is None else ~hidden[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    def hidden_keys(self) -> torch.Tensor | None:
        """Which keys are padding, bool (B, S) in kernel order; None where none is."""
        return None if self.text_valid is None else self.layout.padding(self.text_valid)

    def project(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v in kernel order with norms and rotary embedding applied, each (B, S, H, D)."""
        raise NotImplementedError

    def output(self, attn: nn.Module, out: torch.Tensor, encoder_hidden_states: torch.Tensor | None):
        """What the layer's block expects, from the attention's output (B, S, H * D) in kernel order."""
        raise NotImplementedError

    # `set_attention_backend` and context parallelism write these on whatever processor a layer has.

    @property
    def _attention_backend(self):
        return getattr(self.original, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, value):
        self.original._attention_backend = value

    @property
    def _parallel_config(self):
        return getattr(self.original, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, value):
        self.original._parallel_config = value


class Family:
    """What only this model family knows. One instance per family, without state.

    Attributes:
        name: as in presets and selectors' documentation.
        transformer: class name of the transformers it describes.
        originals: class names of the attention processors that `processor` can stand in for.
        processor: its `SparseProcessor`.
    """

    name: str
    transformer: str
    originals: tuple[str, ...]
    processor: type[SparseProcessor]

    def matches(self, transformer: nn.Module) -> bool:
        return any(cls.__name__ == self.transformer for cls in type(transformer).__mro__)

    def layers(self, transformer: nn.Module) -> dict[str, nn.Module]:
        """Attention modules by layer name, in flat order."""
        raise NotImplementedError

    def blocks(self, transformer: nn.Module) -> tuple[nn.ModuleList, ...]:
        """The lists of blocks, in the order in which they run; those of `layers`, each the next ones."""
        raise NotImplementedError

    def conditional(self, pipeline: Any, inputs: dict[str, Any]) -> slice:
        """Which samples of a conditional call of `pipeline` (None: not known) are conditional."""
        return slice(0, len(inputs["hidden_states"]))

    def layout(self, transformer: nn.Module, inputs: dict[str, Any], memo: dict) -> TokenLayout:
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

    def leading(self, transformer: nn.Module, layout: TokenLayout) -> int:
        """How many visual tokens must stay first in every order, as the model tells them by their place."""
        return 0

    def enter(
        self, transformer: nn.Module, inputs: dict[str, Any], layout: TokenLayout, permute: Permute
    ) -> dict:
        """The inputs with everything that has a place per visual token permuted."""
        raise NotImplementedError

    def leave(
        self, transformer: nn.Module, sample: torch.Tensor, layout: TokenLayout, restore: Permute
    ) -> torch.Tensor:
        """The transformer's output back in its own order."""
        raise NotImplementedError

    def placed_outputs(self, transformer: nn.Module) -> dict[nn.Module, int]:
        """Modules inside whose output must be permuted as well, such as tables of the rotary embedding.

        Each with the dimension of the visual tokens in its output, a tensor or a tuple of tensors.
        """
        return {}

    def layer_layout(self, name: str, layout: TokenLayout) -> TokenLayout:
        """The geometry of one layer of a call, where layers differ; visual tokens are the same in all."""
        return layout

    def refusal(self, module: nn.Module) -> str | None:
        """Why `processor` cannot stand in for this module's processor, with the remedy, or None."""
        original = type(module.processor).__name__
        if original in self.originals:
            return None
        return (
            f"has the attention processor {original}, which accelerated layers cannot stand in for (only "
            f"{', '.join(self.originals)}); unload what installed it (such as an IP-Adapter), or make the "
            "layer dense"
        )


def double_and_single(transformer: nn.Module) -> dict[str, nn.Module]:
    """Attention modules by layer name of a transformer with double-stream, then single-stream blocks."""
    double = {f"double.{i}": block.attn for i, block in enumerate(transformer.transformer_blocks)}
    single = {f"single.{i}": block.attn for i, block in enumerate(transformer.single_transformer_blocks)}
    return double | single


def double_and_single_blocks(transformer: nn.Module) -> tuple[nn.ModuleList, ...]:
    """The blocks of the same."""
    return transformer.transformer_blocks, transformer.single_transformer_blocks


def move_patches(
    latents: torch.Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int], move: Permute
) -> torch.Tensor:
    """Latents (B, C, F, H, W), or (B, C, H, W) of images, with their patches moved to other places.

    There is one patch per token. Rows and columns that fill no patch are cut off, as the models do.
    """
    if latents.ndim == 4:
        return move_patches(latents.unsqueeze(2), grid, patch, move).squeeze(2)
    (f, h, w), (pf, ph, pw) = grid, patch
    latents = latents[:, :, : f * pf, : h * ph, : w * pw]
    batch, channels = latents.shape[:2]
    patches = latents.reshape(batch, channels, f, pf, h, ph, w, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
    tokens = move(patches.reshape(batch, f * h * w, -1), 1)
    patches = tokens.view(batch, f, h, w, channels, pf, ph, pw).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return patches.reshape(batch, channels, f * pf, h * ph, w * pw)


def project_qkv(
    attn: nn.Module, hidden_states: torch.Tensor, fused: bool | None = None
) -> list[torch.Tensor]:
    """q, k, v of self-attention, each (B, S, H * D); `fused` None: as the layer says of itself."""
    if attn.fused_projections if fused is None else fused:
        return list(attn.to_qkv(hidden_states).chunk(3, dim=-1))
    return [attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)]


def project_text_qkv(attn: nn.Module, text: torch.Tensor, fused: bool | None = None) -> list[torch.Tensor]:
    """The same for the text (B, T, C) of joint attention."""
    if attn.fused_projections if fused is None else fused:
        return list(attn.to_added_qkv(text).chunk(3, dim=-1))
    return [attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)]


def read_once(memo: dict, tensor: torch.Tensor, read: Callable[[torch.Tensor], Any]) -> Any:
    """`read(tensor)`, kept in `memo` for the calls to come.

    A run passes the same few tensors at all its steps: reading them once means no device synchronisation per
    step.
    """
    version = None if tensor.is_inference() else tensor._version
    kept, kept_version, value = memo.get(id(tensor), (None, None, None))
    if kept is not tensor or kept_version != version or version is None:
        while len(memo) >= _TENSORS_KEPT:
            del memo[next(iter(memo))]
        value = read(tensor)
        memo[id(tensor)] = (tensor, version, value)
    return value
