"""`python -m samplers.cli`: the `lengthtrack` command."""

from samplers.cli import main

main()
