"""A schedule as tensors: views of buffers that are allocated once, at full size."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
import torch
from numpy.typing import NDArray

from cutaway_server.kernels.batch import Batch
from cutaway_server.scheduler import Work

Integers = NDArray[np.int64]


class BatchBuilder:
    """Fills one `Batch` after another; each is valid until the next is built."""

    def __init__(
        self, *, max_rows: int, max_sequences: int, max_blocks: int, page_size: int, device: torch.device
    ) -> None:
        self.page_size = page_size
        self.device = device
        self.token_ids = np.zeros(max_rows, dtype=np.int64)
        self.positions = np.zeros(max_rows, dtype=np.int64)
        self.slots = np.zeros(max_rows, dtype=np.int64)
        self.store = np.zeros(max_rows, dtype=np.bool_)
        self.query_starts = np.zeros(max_sequences + 1, dtype=np.int64)
        self.lengths = np.zeros(max_sequences, dtype=np.int64)
        self.block_table = np.zeros((max_sequences, max_blocks), dtype=np.int64)
        self.logit_rows = np.zeros(max_rows, dtype=np.int64)

    def build(self, work: Items[Work], logit_rows: Items[Integers]) -> Batch:
        """Lay out `work`; `logit_rows` are the rows of each, counted from its own first, whose logits are wanted."""
        row = wanted = 0
        widest = 1
        for b, (item, rows) in enumerate(zip(work, logit_rows, strict=True)):
            widest = max(widest, len(item.sequence.blocks))
            self._fill(b, row, item)
            self.logit_rows[wanted : wanted + len(rows)] = rows + row
            wanted += len(rows)
            row += item.stop - item.start
            self.query_starts[b + 1] = row
        n = len(work)
        return Batch(
            token_ids=self._view(self.token_ids[:row]),
            positions=self._view(self.positions[:row]),
            slots=self._view(self.slots[:row]),
            store=self._view(self.store[:row]),
            query_starts=self._view(self.query_starts[: n + 1]),
            lengths=self._view(self.lengths[:n]),
            block_table=self._view(self.block_table[:n, :widest]),
            logit_rows=self._view(self.logit_rows[:wanted]),
            page_size=self.page_size,
        )

    def _fill(self, b: int, row: int, item: Work) -> None:
        sequence, end = item.sequence, row + item.stop - item.start
        blocks = self.block_table[b]
        blocks[: len(sequence.blocks)] = sequence.blocks
        blocks[len(sequence.blocks) :] = 0
        self.lengths[b] = max(item.stored, item.stop)
        self.token_ids[row:end] = sequence.tokens[item.start : item.stop]
        positions = self.positions[row:end]
        positions[:] = np.arange(item.start, item.stop)
        store = self.store[row:end]
        np.greater_equal(positions, item.stored, out=store)
        slots = self.slots[row:end]
        slots[:] = blocks[positions // self.page_size] * self.page_size + positions % self.page_size
        slots *= store

    def _view(self, buffer: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(buffer).to(self.device)
