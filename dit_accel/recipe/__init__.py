"""Recipes: which pattern, where (layers, heads, steps), in which format; their files and presets."""

from .noise import NoiseRange
from .recipe import Recipe, presets, resolve

__all__ = ["NoiseRange", "Recipe", "presets", "resolve"]
