"""What a recipe would do to a model at a size, before anything is run."""
