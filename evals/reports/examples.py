"""The example prompts of the documentation.

A model that is trained on other captions needs other prompts: they are changed here, in the Makefile's runs
and in the README's snippets, which tests hold to them, and `make readme` does the rest.
"""

IMAGE = "a fox at the top left on a blue striped background"
VIDEO = "a fox moving left at the center on a blue striped background"
GALLERY = (  # of the README's picture
    "a fox at the top left on a blue striped background",
    "a panda at the center on a green checkered background",
    "a mushroom at the top left and a penguin at the bottom right on a yellow plain background",
    "a rocket at the top right and a pig at the bottom left on a grey gradient background",
)
