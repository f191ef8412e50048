"""What the C library does with memory that a training step frees."""

import ctypes
import os
import platform

# mallopt's parameters (malloc.h) and values: the most that glibc lets come from the heap at a time, of which it gives
# nothing back before 2 GiB lie free at its end, and which grows in large steps.
_SETTINGS = {-3: 32 << 20, -1: 2**31 - 1, -2: 64 << 20}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD


def keep_freed_memory() -> None:
    """Keeps it for the next step, where that is up to glibc and the environment has no MALLOC_ settings of its own.

    By default glibc gives large blocks back to the system at once. A step that trains on a CPU frees hundreds, and the
    next one waits for the system to find and clear as many pages again.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    for parameter, value in _SETTINGS.items():
        libc.mallopt(parameter, value)
