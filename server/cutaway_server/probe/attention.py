"""Attention probabilities of chosen queries, from the stored keys and the log-sum-exp that attention left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cutaway_server.architecture import ModelConfig
from cutaway_server.cache.pages import Pages
from cutaway_server.kernels.attention import soft_cap
from cutaway_server.kernels.batch import Batch

SCORES_AT_ONCE = 2**24  # elements of one tile: 64 MiB in fp32


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads one layer's stored keys and values, for one step."""

    config: ModelConfig
    layer: int
    batch: Batch
    pages: Pages

    def scores(self, q: Tensor, sequence: int, positions: Tensor, heads: Tensor) -> Tensor:
        """Scaled, capped scores of queries [rows, heads, d_head] of one sequence: [heads, rows, keys], hidden at -inf.

        `heads` are the query heads that q has; keys are those from position 0 to the last query's.
        """
        keys = self.keys(sequence, int(positions.max()) + 1)  # [kv_heads, keys, d_head]
        products = q.transpose(0, 1) @ keys[heads // self.config.group].transpose(1, 2)
        return self._masked(products, positions)

    def scores_of_each(self, q: Tensor, sequences: Tensor, positions: Tensor, heads: Tensor) -> Tensor:
        """As `scores`, of queries of as many sequences: [heads, rows, keys], as many keys as the longest has."""
        longest = int(positions.max()) + 1
        table = self.batch.block_table[sequences, : -(-longest // self.pages.page_size)]
        keys = self.pages.keys_of(self.layer, table).transpose(1, 2).flatten(2, 3)[:, :, :longest]
        wanted = keys if _in_order(heads, self.config) else None
        group = self.config.group
        if wanted is not None:  # each key is read once for all heads that share it
            grouped = torch.unflatten(q, 1, (self.config.n_kv_heads, group))
            products = (grouped @ wanted.transpose(2, 3)).flatten(1, 2)
        else:
            products = (keys[:, heads // group] @ q.unsqueeze(-1)).squeeze(-1)
        hidden = self.hidden(positions, 0, longest)
        scores = soft_cap(products * self.config.scale, self.config.attention_softcap)
        return scores.masked_fill_(hidden[:, None], -torch.inf).transpose(0, 1)

    def keys(self, sequence: int, n: int) -> Tensor:
        """Keys fp32 [kv_heads, n, d_head] of one sequence, from position 0 on."""
        return self._flat(self.pages.keys_of(self.layer, self._table(sequence, n)), n)

    def values(self, sequence: int, n: int) -> Tensor:
        """Values, likewise."""
        return self._flat(self.pages.values_of(self.layer, self._table(sequence, n)), n)

    def _table(self, sequence: int, n: int) -> Tensor:
        return self.batch.block_table[sequence, : -(-n // self.pages.page_size)]

    def _flat(self, found: Tensor, n: int) -> Tensor:
        return found.transpose(0, 1).flatten(1, 2)[:, :n]

    def _masked(self, products: Tensor, positions: Tensor) -> Tensor:
        scores = soft_cap(products * self.config.scale, self.config.attention_softcap)
        return scores.masked_fill_(self.hidden(positions, 0, products.shape[-1]), -torch.inf)

    def hidden(self, positions: Tensor, start: int, n: int) -> Tensor:
        """Whether a query must not see a key, of keys [start, start + n): bool [rows, n]."""
        places = torch.arange(start, start + n, device=positions.device)
        hidden = places > positions[:, None]
        if (window := self.config.layers[self.layer].window) is not None:
            hidden |= places <= positions[:, None] - window
        return hidden


def _in_order(heads: Tensor, config: ModelConfig) -> bool:
    return len(heads) == config.n_heads


def tiles(rows: int, per_row: int) -> Iterator[slice]:
    """Slices of so many rows that none has more than SCORES_AT_ONCE elements (or one row)."""
    step = max(1, SCORES_AT_ONCE // max(1, per_row))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
