"""The state of the heap that everything is timed in: it has grown to what is needed, and keeps it.

glibc hands every block from 32 MiB on back to the kernel when it is freed, and the next one of that size arrives as
pages that are not there yet: each first write to one of 4 KiB is a fault, 1.8 us, 15 ms for a bf16 weight of
4096 x 4096. What makes a temporary of a whole weight (`W += B @ A`, topk, a dense gradient, PEFT's merge) then spends
half to three quarters of its time in the kernel, and how much depends on what happened to be left in the heap by the
benchmark before. A server that cares keeps its memory. So does this process: what others are compared with is measured
at its fastest, and the same whatever ran before it.
"""

from __future__ import annotations

import ctypes
import resource

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of malloc.h


def keep() -> bool:
    """From now on freed memory stays with this process: MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=-1 from within.

    False where the C library has no mallopt: another allocator's ways are its own.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(MMAP_MAX, 0)) and bool(mallopt(TRIM_THRESHOLD, -1))


def faults() -> int:
    """Pages that this process has had to be given so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
