"""To be said."""

from samplers.cli.commands import main

__all__ = ["main"]
