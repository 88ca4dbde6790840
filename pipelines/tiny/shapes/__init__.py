"""Coloured shapes on grey: the scenes of the bundled models that were not trained anew on emoji yet."""
