"""Loaders that `loading.py` measures, a module for each library. Each runs in a separate process.

`contract` says what a loader is, `works` what it loads. A module imports its library at the top: where the library is
missing, the process says so, and the benchmark continues without it.
"""
