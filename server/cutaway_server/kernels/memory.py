"""Memory given back while weights are packed."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

CHUNK_BYTES = 2**22  # packed at once


def give_back(rows: Tensor) -> None:
    """Return the whole pages of memory under `rows` to the system; they are never read again.

    A matrix can be most of a model (an embedding often is), and until it is packed both forms of it would be there.
    """
    if sys.platform != "linux":
        return
    start = -(-rows.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (rows.data_ptr() + rows.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start  # the system rounds it up
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def trim() -> None:
    """Return what was freed and the allocator kept: smaller matrices lie in the heap."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))
