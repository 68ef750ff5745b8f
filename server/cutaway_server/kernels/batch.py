"""One step's work as flat tensors: every sequence's rows one after the other, whatever their number.

There is no padding between sequences. A row is one token at one position; its keys are all tokens of its sequence up to
that position, read from the pages of the KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """T rows of B sequences. Integers are int64, on the model's device."""

    token_ids: Tensor  # [T]
    positions: Tensor  # [T], absolute
    slots: Tensor  # [T]: page * page_size + offset, where the row's K/V goes; in page 0 where nothing is stored
    store: Tensor  # [T] bool: False for rows that are revisited
    query_starts: Tensor  # [B + 1]: rows of sequence b are [query_starts[b], query_starts[b + 1])
    lengths: Tensor  # [B]: tokens of the sequence that have K/V once this step's are stored
    block_table: Tensor  # [B, blocks]: pages of each sequence, in order; 0 past its end
    logit_rows: Tensor  # [R]: rows whose logits are asked for
    page_size: int

    @property
    def n_rows(self) -> int:
        """T."""
        return self.token_ids.shape[0]

    def chosen(self, rows: Tensor, *, together: bool = False) -> Batch:
        """Some rows, ascending, as a batch: each a sequence of its own, or, of one sequence, all `together`."""
        sequences = torch.searchsorted(self.query_starts, rows, right=True) - 1
        starts = torch.arange(len(rows) + 1, device=rows.device)
        if together:
            starts, sequences = starts[[0, -1]], sequences[:1]
        return Batch(
            self.token_ids[rows], self.positions[rows], self.slots[rows], self.store[rows], starts,
            self.lengths[sequences], self.block_table[sequences], rows[:0], self.page_size,
        )  # fmt: skip

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device, in one copy that the host does not wait for."""
        if self.token_ids.device == device:
            return self
        parts = (
            self.token_ids, self.positions, self.slots, self.store, self.query_starts, self.lengths, self.block_table,
            self.logit_rows,
        )  # fmt: skip
        joined = torch.cat([part.reshape(-1).long() for part in parts])
        moved = torch.split(joined.pin_memory().to(device, non_blocking=True), [part.numel() for part in parts])
        ids, positions, slots, store, starts, lengths, table, rows = moved
        return Batch(
            ids, positions, slots, store.bool(), starts, lengths, table.view(self.block_table.shape), rows,
            self.page_size,
        )  # fmt: skip
