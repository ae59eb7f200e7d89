"""How Python and the C library are set for a process that moves many small things in batches."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator

_OBJECTS_BEFORE_COLLECTION = 50_000
# Names and numbers of glibc's malloc.h; musl and macOS have no such function.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 32 * 1024 * 1024


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Let Python look for reference cycles less often than by itself.

    What exists by now stays to the end, and what a batch makes has no cycles and is gone with it.
    But a batch makes thousands of objects, of which each seven hundred would start a search: one
    part in twenty of a busy relay's processor time.
    """
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(_OBJECTS_BEFORE_COLLECTION, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def keep_freed_memory() -> None:
    """Keep what one batch has freed for the next, up to `_KEPT_BYTES`, where the C library can.

    Each batch needs some buffers of about a megabyte. Returned to the system in between, their
    pages would be made and cleared each time: up to a tenth of a busy relay's time on a
    virtual machine (https://man7.org/linux/man-pages/man3/mallopt.3.html).
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES // 4)
