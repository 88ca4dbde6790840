"""Attention kernels, each with its plain-PyTorch specification."""

if __name__ == "kernels":
    from .shadow import step_aside

    step_aside()
else:
    from .block_sparse import (
        automatic_backend,
        block_sizes,
        block_sparse_attention,
        can_run,
        default_block_size,
        fastest_backend,
        support_table,
    )

    __all__ = [
        "automatic_backend",
        "block_sizes",
        "block_sparse_attention",
        "can_run",
        "default_block_size",
        "fastest_backend",
        "support_table",
    ]
