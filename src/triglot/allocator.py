"""Memory that a step, of training or of decoding, frees is kept for the next one."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed for the rest of the process; whether it does.

    By default it gives every large block back to the system at once, and a step, which makes the same tensors as the
    one before, waits for the same pages to be mapped and zeroed again.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
