"""`python -m samplers.cli`: the `lengthtrack` command."""

from samplers.cli import main

if __name__ == "__main__":
    main()
