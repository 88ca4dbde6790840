"""Sweeps: recipes against dense attention, one row per setting with its speed and its quality."""
