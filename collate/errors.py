"""The one exception of the package that is not Python's own."""


class LengthError(ValueError):
    """A length is not what it says: declared, stored and real lengths differ, or one is impossible.

    It is built from a single string, so that it crosses from a loader's worker to the main process as itself.
    """
