"""Trained scorers and feature extractors of images, and where their weights come from."""
