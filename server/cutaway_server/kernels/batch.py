"""One step's work as flat tensors: every sequence's rows one after the other, whatever their number.

There is no padding between sequences. A row is one token at one position; its keys are all tokens of its sequence up to
that position, read from the pages of the KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass

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
