"""Attention kernels, each with its plain-PyTorch specification."""

if __name__ == "kernels":
    from .shadow import step_aside

    step_aside()
else:
    from .block_sparse import block_sparse_attention
    from .block_sparse.backends import (
        automatic_backend,
        block_sizes,
        can_run,
        default_block_size,
        fastest_backend,
        quantizations,
        support_table,
    )
    from .block_sparse.problem import TAILS
    from .block_sparse.quantized import quantize_int8
    from .block_sparse.tail import achieved_pooled_density, least_pooled_density, pooled_density
    from .block_sparse.validation import checked_text_valid
    from .merging import merge

    __all__ = [
        "TAILS",
        "achieved_pooled_density",
        "automatic_backend",
        "block_sizes",
        "block_sparse_attention",
        "can_run",
        "checked_text_valid",
        "default_block_size",
        "fastest_backend",
        "least_pooled_density",
        "merge",
        "pooled_density",
        "quantizations",
        "quantize_int8",
        "support_table",
    ]
