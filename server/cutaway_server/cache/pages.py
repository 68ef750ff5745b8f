"""The tensors behind the blocks: keys and values of every layer, in pages."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cutaway_server.architecture import ModelConfig


@dataclass(frozen=True, slots=True)
class Pages:
    """Keys (rotated) and values [layers, pages, kv_heads, page_size, d_head]. Page 0 belongs to nobody."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None  # of int8: fp32 [layers, pages, kv_heads, page_size]
    value_scales: Tensor | None = None

    @property
    def n_pages(self) -> int:
        """Pages, page 0 included."""
        return self.keys.shape[1]

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.keys.shape[3]

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy whole pages, every layer; `source` and `target` are [n] page numbers and do not overlap."""
        for stored in (self.keys, self.values, self.key_scales, self.value_scales):
            if stored is not None:
                stored[:, target] = stored[:, source]


def allocate_pages(
    config: ModelConfig, n_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
) -> Pages:
    """Zeroed pages, so that what nobody has written yet is finite."""
    shape = (config.n_layers, n_pages, config.n_kv_heads, page_size, config.d_head)
    if device.type == "cpu":
        return Pages(_untouched(shape, dtype), _untouched(shape, dtype))
    return Pages(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))


def _untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros whose memory the system commits page by page, when first written; torch.zeros writes all of it."""
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page: keys and values of every layer."""
    return 2 * config.n_layers * config.n_kv_heads * page_size * config.d_head * dtype.itemsize
