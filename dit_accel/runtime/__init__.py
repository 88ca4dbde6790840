"""A recipe on a transformer: switching, binding, sampler steps, masks of each geometry, cost model."""
