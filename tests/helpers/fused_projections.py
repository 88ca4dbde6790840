"""Families in which diffusers' own `fuse_qkv_projections` fails: error, message and reason."""

CANNOT_FUSE: dict[str, tuple[type[Exception], str, str]] = {
    "ltx2": (
        RuntimeError,
        "Sizes of tensors must match",
        "diffusers fails at attention from video to audio",
    ),
    "kandinsky5": (AttributeError, "no attribute 'to_q'", "diffusers looks for projections of other names"),
}
