"""The `lengthtrack` command: index, verify, report, convert and show.

Imports every room of `samplers`. Nothing imports `cli`.
Terms: a *source* is an index file, a folder, or shards; a *column* is a part of a row before conversion, a *field*
after it; a *summary* is a plan with its costs. Wrong input gives one line with a remedy, and exit status 1.
`commands` and `arguments` declare the commands without torch and NumPy: TAB completion loads them each time.
Their bodies are in `index_commands` and `sample_commands`, their output in `printing` and `plots`.
"""

from samplers.cli.commands import main

__all__ = ["main"]
