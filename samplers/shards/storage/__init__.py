"""Files and processes: bytes at any offset, local or remote; atomic files; file locks; names of shards; a process pool.

Remote files are in the room `network`; a local one is read by the same calls.

Imports `collate.errors` and `collate.widths`, and nothing else of this project.
Terms: a *path* is local, a *URL* names a remote file, and an *offset* counts bytes from the start of a file.
A file is *atomic*: it appears under its final name when it is complete, or never.
A *pattern* (braces, wildcards, a folder) stands for a list of shards.
"""
