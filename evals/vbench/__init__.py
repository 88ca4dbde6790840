"""VBench: prompts and file names, dimensions of our own, and its scores."""
