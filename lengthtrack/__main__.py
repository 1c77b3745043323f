"""`python -m lengthtrack`, and the `lengthtrack` command: no file of the user's hides its packages."""

from samplers.cli import main

if __name__ == "__main__":
    main()
