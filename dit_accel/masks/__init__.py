"""Token layouts, token orders, block masks and how they are built from rules over pairs of tokens."""
