"""The heap in which everything is timed: it has grown to what is needed, and keeps its memory.

glibc gives every block of 32 MiB or more back to the kernel when it is freed, and the next block of that size
consists of pages that are not there yet: the first write to each page of 4 KiB is a fault of 1.8 us, together 15 ms
for a bf16 weight of 4096 x 4096. A way that makes a temporary of a whole weight (`W += B @ A`, topk, a dense
gradient, PEFT's merge) then spends half to three quarters of its time in the kernel, and how much depends on what the
benchmark before happened to leave in the heap. A server can choose to keep its memory, and so does this process: all
ways are measured at their fastest, whatever ran before.
"""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # from malloc.h


def keep() -> bool:
    """From now on freed memory stays with this process, as with MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=-1.

    Returns False where the C library has no mallopt, so that nothing is known about its allocator.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(MMAP_MAX, 0)) and bool(mallopt(TRIM_THRESHOLD, -1))


def faults() -> int:
    """The page faults of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def resident(field: str) -> int:
    """Bytes of memory of this process: VmRSS now, VmHWM at the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}")
