"""Loaders whose worker is killed: torch's handler of SIGCHLD raises wherever the interpreter happens to be."""

import pytest

# In a finalizer or in a callback of a collection (Hypothesis has one) Python can only report what the handler raises.
# The loader finds the worker dead at its next read all the same.
kills_workers = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
