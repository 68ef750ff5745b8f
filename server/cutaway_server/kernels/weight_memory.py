"""Memory for what every step reads from one end to the other, in the system's huge pages where it has them."""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor

HUGE = 2**21
CHUNK = 2**26
LINE = 64


class WeightMemory:
    """Hands out tensors that lie one after the other in large mappings; memory is committed as it is written.

    With 4 KiB pages the processor stops reading ahead at every page's end, and looks up 512 times as many addresses.
    A mapping is freed when the last tensor in it is.
    """

    def __init__(self) -> None:
        self._mapping: mmap.mmap | None = None
        self._next = self._end = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros, aligned to a cache line."""
        count = prod(shape)
        size = -(-count * dtype.itemsize // LINE) * LINE
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        if self._mapping is None or self._next + size > self._end:
            self._map(max(size, CHUNK))
        assert self._mapping is not None
        tensor = torch.frombuffer(self._mapping, dtype=dtype, count=count, offset=self._next)
        self._next += size
        return tensor.view(shape)

    def _map(self, size: int) -> None:
        """A new mapping of which `size` bytes from a huge page's start on are used."""
        self._mapping = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._next = -torch.frombuffer(self._mapping, dtype=torch.uint8).data_ptr() % HUGE
        self._end = self._next + size
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                self._mapping.madvise(mmap.MADV_HUGEPAGE)
            except OSError:
                return  # a system without them: small pages do
