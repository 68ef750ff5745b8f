"""Weights as the native products read them: blocks of 16 output features side by side, bf16 in pairs of depth."""

from __future__ import annotations

import ctypes
import mmap
import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 16
CHUNK_BYTES = 2**24  # packed at once
TILE = 32  # columns of a product's tile, and depth of a bf16 one


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix [columns, depth]: bf16 as int32 pairs [blocks, depth / 2, 16], fp32 as [blocks, depth, 16]."""

    data: Tensor
    bias: Tensor | None  # fp32, as long as the columns with their padding
    columns: int
    depth: int

    @property
    def tiles(self) -> int:
        """Tiles of 32 columns, padding included."""
        return self.data.shape[0] * BLOCK // TILE

    @property
    def padded_depth(self) -> int:
        """Depth with its padding."""
        return self.data.shape[1] * (2 if self.data.dtype == torch.int32 else 1)

    def rows(self, numbers: Tensor) -> Tensor:
        """Rows [n, depth] of the matrix as it was before packing."""
        found = self.data[numbers // BLOCK, :, numbers % BLOCK]
        plain = found.view(torch.bfloat16) if found.dtype == torch.int32 else found
        return plain[:, : self.depth]


def pack(weight: Tensor, bias: Tensor | None = None, *, consume: bool = False) -> Packed:
    """Pack a matrix [columns, depth] in bf16 or fp32. To `consume` it gives its memory back, chunk by chunk."""
    columns = len(weight)
    padded_bias = None if bias is None else F.pad(bias.float(), (0, -columns % TILE))
    return Packed(_blocks((weight,), consume), padded_bias, columns, weight.shape[1])


def pack_gated(weight: Tensor, bias: Tensor | None = None, *, consume: bool = False) -> Packed:
    """Pack gate and up [2 * d_mlp, depth], in turn by blocks of 16 columns, so that a tile has both."""
    gate, up = weight.chunk(2)
    data = _blocks((gate, up), consume)
    together = None
    if bias is not None:
        halves = (F.pad(half.float(), (0, -len(half) % BLOCK)).view(-1, BLOCK) for half in bias.chunk(2))
        together = torch.stack(tuple(halves), 1).flatten()
    return Packed(data, together, data.shape[0] * BLOCK, weight.shape[1])


def _blocks(parts: tuple[Tensor, ...], consume: bool) -> Tensor:
    """Blocks of 16 rows of each part in turn, transposed; zeros fill the last tile."""
    rows, depth = parts[0].shape
    narrow = parts[0].dtype == torch.bfloat16
    padded_depth = depth + (-depth % TILE if narrow else 0)
    n_blocks = len(parts) * -(-rows // BLOCK)
    words, dtype = (padded_depth // 2, torch.int32) if narrow else (padded_depth, torch.float32)
    out = torch.empty(n_blocks + n_blocks % 2, words, BLOCK, dtype=dtype)  # memory comes as it is written
    out[n_blocks:] = 0
    step = BLOCK * max(1, CHUNK_BYTES // (BLOCK * depth * parts[0].element_size()))
    for start in range(0, rows, step):
        for place, part in enumerate(parts):
            some = part[start : start + step]
            padded = F.pad(some, (0, padded_depth - depth, 0, -len(some) % BLOCK)).contiguous()
            blocks = torch.unflatten(padded.view(dtype), 0, (-1, BLOCK)).transpose(1, 2)
            first = start // BLOCK * len(parts) + place
            out[first : first + len(blocks) * len(parts) : len(parts)] = blocks
            if consume:
                _give_back(some)
    if consume:
        parts[0].untyped_storage().resize_(0)
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(ctypes.c_size_t(0))  # smaller matrices lie in the heap, which keeps what is freed
    return out


def _give_back(rows: Tensor) -> None:
    """Return the whole pages of memory under `rows` to the system; they are never read again.

    A matrix can be most of a model (an embedding often is), and until it is packed both forms of it would be there.
    """
    if sys.platform != "linux":
        return
    start = -(-rows.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (rows.data_ptr() + rows.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start  # the system rounds it up
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
