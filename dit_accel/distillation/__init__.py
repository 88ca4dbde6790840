"""Distillation: a model's attention is trained to a pattern, and kept as an adapter that recipes load."""
