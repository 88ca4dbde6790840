"""The example prompts of the documentation.

A model that is trained on other captions needs other prompts: they are changed here, in the Makefile's runs
and in the README's snippets, which tests hold to them, and `make readme` does the rest.
"""

IMAGE = "a red circle at the top left on a striped background"
VIDEO = "a blue square moving left at the center on a plain background"
GALLERY = (  # of the README's picture
    "a red circle at the top left on a striped background",
    "a blue cross at the center on a checkered background",
    "a yellow square at the top right on a plain background",
    "a green triangle at the bottom left on a striped background",
)
