"""Several GPUs: one picture or video by several processes."""

from .context import context_parallel, plan_of
from .patch import patch_parallel

__all__ = ["context_parallel", "patch_parallel", "plan_of"]
