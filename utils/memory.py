"""Give memory back to the operating system."""

import ctypes
import functools
import sys


@functools.cache
def trim_function():
    """glibc's malloc_trim, or None where the C library is another."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def release_memory():
    """Gives back what large pictures took: glibc keeps freed memory, for each thread, and it may then miss elsewhere."""
    if trim_function():
        trim_function()(0)
