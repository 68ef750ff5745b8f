"""The tensors behind the blocks: keys and values of every layer, in pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cutaway_server.architecture import ModelConfig


@dataclass(frozen=True, slots=True)
class Pages:
    """Keys (rotated) and values [layers, pages, kv_heads, page_size, d_head]. Page 0 belongs to nobody."""

    keys: Tensor
    values: Tensor

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
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]


def allocate_pages(
    config: ModelConfig, n_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
) -> Pages:
    """Zeroed pages, so that what nobody has written yet is finite. On a CPU memory is committed when first written."""
    shape = (config.n_layers, n_pages, config.n_kv_heads, page_size, config.d_head)
    return Pages(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))


def page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page: keys and values of every layer."""
    return 2 * config.n_layers * config.n_kv_heads * page_size * config.d_head * dtype.itemsize
