"""`python -m lengthtrack`: the `lengthtrack` command."""

from samplers.cli import main

main()
