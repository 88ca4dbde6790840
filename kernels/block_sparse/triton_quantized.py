"""Block-sparse attention in a numeric format, in Triton: `triton_quantize`, then the kernel."""

from __future__ import annotations

import importlib

import torch
import triton

from dit_accel.masks.block_mask import BlockMask

from . import triton_configs
from .formats import Format, key_group
from .integer_products import warn_of_older_instructions
from .launch_order import mask_arguments
from .triton_forward import INTERPRETED, LAUNCH_OPTIONS, addressable, outputs
from .triton_quantize import quantize


def quantized_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    format: Format,
    *,
    scale: float,
    text_valid: torch.Tensor | None,
    pv_threshold: float | None = None,
    kernel: str = "pointer",
    options: dict[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` in a numeric format, by one of the kernels that `tuned` names; `options` are a launch's.

    Others than `"pointer"` know no threshold, `"gluon"` only formats whose values stay in 16 bits.

    Raises:
        UnavailableError: the kernel in Gluon does not compile with this Triton; the message says why.
    """
    if INTERPRETED and q.dtype == torch.bfloat16:  # which the interpreter does not know
        wide, rest = (x.float() for x in (q, k, v)), {"kernel": kernel, "options": options}
        given = {"scale": scale, "text_valid": text_valid, "pv_threshold": pv_threshold}
        out, lse = quantized_attention(*wide, mask, format, **given, **rest)
        return out.to(q.dtype), lse
    module = importlib.import_module(f"{__package__}.triton_{'forward' if kernel == 'pointer' else kernel}")
    if kernel == "gluon":
        module.check_that_it_compiles(q, format.name)
    q, k, v = addressable(q), addressable(k), addressable(v)
    if kernel != "pointer" and format.weights is None:
        from .triton_tma import copied, describable

        v = v if describable(v) else copied(v)
    gpu = (9, 0) if INTERPRETED else torch.cuda.get_device_capability(q.device)
    warn_of_older_instructions(gpu, triton.__version__)
    if options is None and kernel == "pointer":
        options = triton_configs.quantized_config(q.shape[3], q.dtype, format, mask.block_size, gpu)
    elif options is None:
        config = getattr(triton_configs, f"{kernel}_config")
        options = config(q.shape[3], mask.block_size, gpu, format)
    given = quantize(
        q, k, v, format, group=key_group(mask.block_size[1]), dim=module.held_head_dim(q.shape[3]),
        scale=scale, text=mask.text, text_valid=text_valid,
    )  # fmt: skip
    out, lse = outputs(q)
    of_values = {"pointer": (format.weights, pv_threshold), "tma": (format.weights,), "gluon": ()}[kernel]
    grid, args, chosen = module.launch_arguments(
        q, k, v, out, lse, mask_arguments(mask, *q.shape[:2]), text_valid, 1.0, mask.block_size, mask.text,
        options, given, *of_values,
    )  # fmt: skip
    with torch.cuda.device_of(q):
        module._forward[grid](*args, **chosen, **LAUNCH_OPTIONS)
    return out, lse
