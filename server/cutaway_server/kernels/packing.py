"""Weights as the native products read them: blocks of 16 output features side by side, bf16 in pairs of depth."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from cutaway_server.kernels.memory import CHUNK_BYTES, give_back, trim
from cutaway_server.kernels.packing_quantized import PackedQuantized, PackedStack, pack_quantized
from cutaway_server.kernels.quantized import Kind, Quantized
from cutaway_server.kernels.rounding import Rounded
from cutaway_server.kernels.weight_memory import WeightMemory

BLOCK = 16
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


AnyPacked = Packed | PackedQuantized | PackedStack


def pack(
    weight: Tensor | Quantized, bias: Tensor | None = None, *, rounded: Kind | None = None, consume: bool = False,
    memory: WeightMemory | None = None,
) -> AnyPacked:  # fmt: skip
    """Pack a matrix [columns, depth]: as it is, or a float one rounded to integers.

    To `consume` it gives its memory back, chunk by chunk. What is packed lies in `memory`, or in some of its own.
    """
    memory = memory or WeightMemory()
    columns, depth = weight.shape
    padded_bias = None if bias is None else F.pad(bias.float(), (0, -columns % TILE))
    if isinstance(weight, Quantized):
        stacked = tuple(pack_quantized((run,), None, memory, consume=consume) for run in weight.runs())
        return replace(stacked[0], bias=padded_bias) if len(stacked) == 1 else PackedStack(stacked, padded_bias)
    if rounded is not None:
        return pack_quantized((Rounded(weight, rounded),), padded_bias, memory, consume=consume)
    return Packed(_blocks((weight,), memory, consume=consume), padded_bias, columns, depth)


def pack_gated(
    weight: Tensor | Quantized, bias: Tensor | None = None, *, rounded: Kind | None = None, consume: bool = False,
    memory: WeightMemory | None = None,
) -> AnyPacked:  # fmt: skip
    """Pack gate and up [2 * d_mlp, depth], in turn by blocks of 16 columns, so that a tile has both."""
    memory = memory or WeightMemory()
    together = None
    if bias is not None:
        halves = (F.pad(half.float(), (0, -len(half) % BLOCK)).view(-1, BLOCK) for half in bias.chunk(2))
        together = torch.stack(tuple(halves), 1).flatten()
    rows = weight.shape[0]
    if isinstance(weight, Quantized):
        return pack_quantized(
            (weight.cut(0, rows // 2), weight.cut(rows // 2, rows)), together, memory, consume=consume
        )
    gate, up = weight.chunk(2)
    if rounded is not None:
        return pack_quantized((Rounded(gate, rounded), Rounded(up, rounded)), together, memory, consume=consume)
    data = _blocks((gate, up), memory, consume=consume)
    return Packed(data, together, data.shape[0] * BLOCK, weight.shape[1])


def _blocks(parts: tuple[Tensor, ...], memory: WeightMemory, *, consume: bool) -> Tensor:
    """Blocks of 16 rows of each part in turn, transposed; zeros fill the last tile."""
    rows, depth = parts[0].shape
    narrow = parts[0].dtype == torch.bfloat16
    padded_depth = depth + (-depth % TILE if narrow else 0)
    n_blocks = len(parts) * -(-rows // BLOCK)
    words, dtype = (padded_depth // 2, torch.int32) if narrow else (padded_depth, torch.float32)
    out = memory.empty((n_blocks + n_blocks % 2, words, BLOCK), dtype)
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
                give_back(some)
    if consume:
        parts[0].untyped_storage().resize_(0)
        trim()
    return out
