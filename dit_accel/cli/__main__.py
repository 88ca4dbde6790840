"""`python -m dit_accel.cli`: the same as `dit-accel`."""

from . import main

main()
