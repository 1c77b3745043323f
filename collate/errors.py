"""Errors that both packages share: the one that is not Python's own, and which of them mean too little memory."""

from typing import Final

# cuBLAS and cuDNN have their own texts (CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED), and so has torch on the
# host (DefaultCPUAllocator: can't allocate memory).
_OUT_OF_MEMORY: Final = ("out of memory", "ALLOC_FAILED", "DefaultCPUAllocator")


class LengthError(ValueError):
    """A length is not what it says: declared, stored and real lengths differ, or one is impossible.

    It is built from a single string, so that it crosses from a loader's worker to the main process as itself.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch or its libraries says that memory ran out.

    >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))
    True
    """
    if isinstance(error, MemoryError):
        return True
    # torch.OutOfMemoryError, by name: this module is imported where torch is not.
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
