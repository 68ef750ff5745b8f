"""A schedule as tensors: views of buffers that are allocated once, at full size."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
import torch
from numpy.typing import NDArray

from cutaway_server.kernels.batch import Batch
from cutaway_server.scheduler import Sequence, Work

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
        self._tables = BlockTables(max_sequences, max_blocks)

    def build(self, work: Items[Work], wanted: Items[int]) -> Batch:
        """Lay out `work`; `wanted` counts the rows, at the end of each, whose logits are wanted."""
        n, page_size = len(work), self.page_size
        starts = np.array([item.start for item in work], np.int64)
        stops = np.array([item.stop for item in work], np.int64)
        stored = np.array([item.stored for item in work], np.int64)
        counts = stops - starts
        np.cumsum(counts, out=self.query_starts[1 : n + 1])
        rows = int(self.query_starts[n])
        np.maximum(stored, stops, out=self.lengths[:n])
        table = self._tables.gather([item.sequence for item in work], self.block_table)

        self.token_ids[:rows] = [token for item in work for token in item.sequence.tokens[item.start : item.stop]]
        positions, store, slots = self.positions[:rows], self.store[:rows], self.slots[:rows]
        np.add(np.arange(rows), np.repeat(starts - self.query_starts[:n], counts), out=positions)
        np.greater_equal(positions, np.repeat(stored, counts), out=store)
        pages = table[np.repeat(np.arange(n), counts), positions // page_size]
        np.add(pages * page_size, positions % page_size, out=slots)
        slots *= store
        return Batch(
            token_ids=self._view(self.token_ids[:rows]),
            positions=self._view(positions),
            slots=self._view(slots),
            store=self._view(store),
            query_starts=self._view(self.query_starts[: n + 1]),
            lengths=self._view(self.lengths[:n]),
            block_table=self._view(table),
            logit_rows=self._view(self._logit_rows(np.array(wanted, np.int64))),
            page_size=page_size,
        )

    def _logit_rows(self, wanted: Integers) -> Integers:
        """The last rows of each sequence, so many as are wanted."""
        ends = np.cumsum(wanted)
        found = self.logit_rows[: int(ends[-1])]
        last = self.query_starts[1 : len(wanted) + 1]
        np.add(np.arange(len(found)), np.repeat(last - ends, wanted), out=found)
        return found

    def _view(self, buffer: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(buffer).to(self.device)


class BlockTables:
    """The blocks of each sequence as a row of integers, to which only new blocks are written in a step.

    A list of blocks only grows: whoever changes one in any other way makes a new list (`Sequence.blocks`).
    """

    def __init__(self, rows: int, max_blocks: int) -> None:
        self._table = np.zeros((rows, max_blocks), dtype=np.int64)
        self._free = list(range(rows))
        self._rows: dict[Sequence, int] = {}
        self._blocks: list[list[int]] = [[] for _ in range(rows)]  # the list that each row was written from
        self._written = [0] * rows  # and how much of it

    def gather(self, sequences: Items[Sequence], out: Integers) -> Integers:
        """The tables of `sequences`, as a view [n, longest] of `out` [rows, max_blocks]; 0 past a sequence's end."""
        if sum(sequence not in self._rows for sequence in sequences) > len(self._free):
            self._forget(set(self._rows) - set(sequences))
        rows = [self._row(sequence) for sequence in sequences]
        longest = max(len(sequence.blocks) for sequence in sequences)
        view = out[: len(rows), :longest]
        view[...] = self._table[rows, :longest]
        return view

    def _forget(self, sequences: set[Sequence]) -> None:
        for sequence in sequences:
            row = self._rows.pop(sequence)
            self._free.append(row)
            self._blocks[row] = []

    def _row(self, sequence: Sequence) -> int:
        """The sequence's row, brought up to date."""
        row = self._rows.get(sequence)
        if row is None:
            row = self._rows[sequence] = self._free.pop()
        blocks, written = sequence.blocks, self._written[row]
        if blocks is not self._blocks[row]:
            self._table[row, len(blocks) : written] = 0
            self._blocks[row], written = blocks, 0
        if written < len(blocks):
            self._table[row, written : len(blocks)] = blocks[written:]
        self._written[row] = len(blocks)
        return row
