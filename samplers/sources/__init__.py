"""Lengths from data as people have it: Hugging Face datasets, Arrow, Parquet, JSON lines, Megatron and NumPy files.

Imports nothing of `samplers`. `planning`, `shards`, `inference`, `cli` and the package root import it.
Terms: a *column* is a named part of every row; a *list column* holds a sequence in each row. pyarrow and other
dependencies that not everybody has come through `extras`, when they are used.
"""
