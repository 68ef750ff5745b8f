"""The tensors behind the blocks: keys and values of every layer, in pages.

They are stored as floats, as a rule in the model's dtype, or in 8 bits (int8 or e4m3) with one fp32 scale for each
vector of a head.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

from cutaway_server.architecture import ModelConfig

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # what 8 bits hold: stored with scales
FORMATS = (torch.float32, torch.bfloat16, torch.float16, *LARGEST)


@dataclass(frozen=True, slots=True)
class Pages:
    """Keys (rotated) and values [layers, pages, kv_heads, page_size, d_head]. Page 0 belongs to nobody."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None  # of 8 bits: fp32 [layers, pages, kv_heads, page_size]
    value_scales: Tensor | None = None

    @property
    def n_pages(self) -> int:
        """Pages, page 0 included."""
        return self.keys.shape[1]

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.keys.shape[3]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: keys and values of every layer, and their scales."""
        parts = (self.keys, self.values, self.key_scales, self.value_scales)
        return sum(part.nbytes for part in parts if part is not None) // self.n_pages

    def gather(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [n, kv_heads, d_head] of a layer at slots [n]: copies, as stored; fp32 if that is 8 bits."""
        index = (slots // self.page_size, slice(None), slots % self.page_size)
        if self.key_scales is not None:
            return self.keys_of(layer, index), self.values_of(layer, index)
        return self.keys[layer][index], self.values[layer][index]

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy whole pages, every layer; `source` and `target` are [n] page numbers and do not overlap."""
        for stored in (self.keys, self.values, self.key_scales, self.value_scales):
            if stored is not None:
                stored[:, target] = stored[:, source]

    def store(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write keys and values fp32 [T, kv_heads, d_head] of a layer at slots [T] (page * page_size + offset)."""
        page, offset = slots // self.page_size, slots % self.page_size
        for x, stored, scales in ((keys, self.keys, self.key_scales), (values, self.values, self.value_scales)):
            if scales is None:
                stored[layer][page, :, offset] = x.to(stored.dtype)
            else:
                stored[layer][page, :, offset], scales[layer][page, :, offset] = quantize(x, stored.dtype)

    def keys_of(self, layer: int, index: object) -> Tensor:
        """Keys of a layer at `index` into [pages, kv_heads, ...], as fp32: a copy."""
        return _read(self.keys[layer], None if self.key_scales is None else self.key_scales[layer], index)

    def values_of(self, layer: int, index: object) -> Tensor:
        """Values of a layer at `index` into [pages, kv_heads, ...], as fp32: a copy."""
        return _read(self.values[layer], None if self.value_scales is None else self.value_scales[layer], index)


def quantize(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Vectors [..., d] in 8 bits, and the scale [...] of each vector: its largest / the most that `dtype` holds.

    One not all finite gets 0s and NaN.
    """
    most = x.abs().amax(-1)
    scales = torch.where(most.isfinite(), most / LARGEST[dtype], torch.nan)
    divisors = torch.where(scales > 0, scales, 1.0)
    rounded = x / divisors[..., None] if dtype.is_floating_point else torch.round(x / divisors[..., None])
    return rounded.masked_fill(scales.isnan()[..., None], 0.0).to(dtype), scales


def allocate_pages(
    config: ModelConfig, n_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
) -> Pages:
    """Zeroed pages, so that what nobody has written yet is finite."""
    vectors = (config.n_layers, n_pages, config.n_kv_heads, page_size)
    shape = (*vectors, config.d_head)
    stored = (_zeros(shape, dtype, device), _zeros(shape, dtype, device))
    if dtype not in LARGEST:
        return Pages(*stored)
    return Pages(*stored, _zeros(vectors, torch.float32, device), _zeros(vectors, torch.float32, device))


def page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page: keys and values of every layer, and their scales."""
    vector = config.d_head * dtype.itemsize + (torch.float32.itemsize if dtype in LARGEST else 0)
    return 2 * config.n_layers * config.n_kv_heads * page_size * vector


def _read(stored: Tensor, scales: Tensor | None, index: object) -> Tensor:
    found = stored[index].to(torch.float32)  # type: ignore[index]
    return found if scales is None else found * scales[index][..., None]  # type: ignore[index]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU the system commits their memory when it is first written, where torch.zeros writes all of it."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)  # the cache is read in small pieces all over: each would miss the TLB
    return torch.frombuffer(memory, dtype=dtype).view(shape)
