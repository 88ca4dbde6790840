"""Several GPUs: one picture or video by several processes."""

from .context import context_parallel, plan_of

__all__ = ["context_parallel", "plan_of"]
