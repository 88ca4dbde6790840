"""Demonstrations, and the pictures that the README shows."""
