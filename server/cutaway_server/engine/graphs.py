"""Whole decode steps, recorded once for each size and replayed: one launch for a step, whatever its tokens are.

A step of R sequences, one row each, is laid out for the next size up. Rows that fill it are sequences of one token
whose keys go to page 0, which nobody reads. Everything that steers a step goes to the device in one copy of one buffer
(`packed.py`). Sizes are the rows, the 256-key splits of all rows together, the pages of the longest and how tokens are
drawn, each the next power of two (of rows at most `max_rows`); graphs are recorded when first needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cutaway_server.cache.pages import Pages
from cutaway_server.engine.capture import Capture, Replay
from cutaway_server.engine.draws import Draws, draw
from cutaway_server.engine.packed import Packed, Size, elements
from cutaway_server.kernels.batch import Batch
from cutaway_server.kernels.cuda.launch import power_of_two
from cutaway_server.kernels.cuda.work import SPLIT, Splits, split_arrays
from cutaway_server.kernels.interface import OpenKernels
from cutaway_server.kernels.plan import Plan
from cutaway_server.model.probed import Probe
from cutaway_server.model.transformer import Transformer

Integers = NDArray[np.int64]


class RecordableKernels(OpenKernels, Protocol):
    """Kernels whose plan can be made without looking at the batch."""

    def plan_of(self, batch: Batch, work: tuple[Splits, ...], prompts: Tensor | None = None) -> Plan:
        """A plan whose work is laid out already."""


class Outputs(NamedTuple):
    """What a graph leaves on the device, of all its rows."""

    residual: Tensor  # fp32 [rows, d_model]
    drawn: Tensor | None  # int64 [2, rows]: token, whether it is valid


@dataclass(frozen=True, slots=True)
class Recording:
    """A graph and the tensors it reads and writes."""

    inputs: Tensor
    outputs: Outputs
    replay: Replay


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on its way. `residual` [R, d_model] is to be used before the next step is launched."""

    residual: Tensor
    _drawn: Tensor | None
    _done: torch.cuda.Event | None

    def tokens(self) -> tuple[list[int], list[bool]]:
        """Wait for the drawn tokens: token and whether it is valid, of each row."""
        assert self._drawn is not None, "launched without draws"
        if self._done is not None:
            self._done.synchronize()
        tokens, valid = self._drawn.tolist()
        return tokens, [bool(v) for v in valid]


class DecodeGraphs:
    """Launches decode steps of one model over one set of pages."""

    def __init__(self, kernels: RecordableKernels, pages: Pages, *, max_rows: int, capture: Capture) -> None:
        """`max_rows` is the most sequences of one step."""
        self.kernels = kernels
        self.pages = pages
        self.max_rows = max_rows
        self._capture = capture
        self._device = pages.keys.device
        self._recorded: dict[Size, Recording] = {}
        self._last = torch.zeros(max_rows, dtype=torch.int64, device=self._device)  # tokens of the step before

    @property
    def sizes(self) -> list[Size]:
        """What graphs there are."""
        return list(self._recorded)

    def fits(self, batch: Batch) -> bool:
        """Whether the step has one row of each sequence, and wants all of them."""
        rows = batch.n_rows
        return 0 < rows <= self.max_rows and len(batch.lengths) == rows == len(batch.logit_rows)

    def launch(self, batch: Batch, draws: Draws | None = None, previous: Integers | None = None) -> Launched:
        """Start a step of a batch that `fits`, on the host; returns before it is computed.

        `previous` [R] names the row of the step before whose drawn token is this row's token id, -1: the batch has it.
        """
        assert self.fits(batch)
        positions = batch.positions.numpy()
        items = int((positions // SPLIT + 1).sum())
        size = self._size(batch, items, draws)
        packed = self._pack(batch, size, draws, previous)
        recording = self._recorded.get(size)
        if recording is None:
            recording = self._recorded[size] = self._record(size, packed)
        else:
            recording.inputs.copy_(packed, non_blocking=True)
            recording.replay()
        return self._launched(recording, batch.n_rows)

    def _size(self, batch: Batch, items: int, draws: Draws | None) -> Size:
        rows = min(power_of_two(batch.n_rows), self.max_rows)
        drawing = "no" if draws is None else "greedy" if draws.greedy else "plain"
        return Size(rows, power_of_two(items + rows - batch.n_rows), power_of_two(batch.block_table.shape[1]), drawing)

    def _pack(self, batch: Batch, size: Size, draws: Draws | None, previous: Integers | None) -> Tensor:
        """The step as one pinned buffer."""
        buffer = torch.zeros(elements(size), dtype=torch.int64, pin_memory=self._device.type == "cuda")
        lay, n = Packed.of(buffer, size), batch.n_rows
        lay.token_ids[:n], lay.positions[:n], lay.slots[:n] = batch.token_ids, batch.positions, batch.slots
        lay.previous.fill_(-1)
        if previous is not None:
            lay.previous[:n] = torch.from_numpy(previous)
        lay.draws[0].view(torch.float64).fill_(1.0)  # rows that fill the size: a temperature of one, greedy
        lay.draws[4] = 1
        if draws is not None:
            lay.draws[:, :n] = torch.from_numpy(draws.numbers)
        lay.block_table[:n, : batch.block_table.shape[1]] = batch.block_table
        rows = np.arange(size.rows)
        splits = lay.positions.numpy() // SPLIT + 1
        tiles, items, of_rows = map(torch.from_numpy, split_arrays(np.stack([rows, np.ones_like(rows), rows, splits])))
        lay.tiles[:], lay.rows[:] = tiles, of_rows
        lay.items[0] = -1
        lay.items[:, : items.shape[1]] = items
        return buffer

    def _record(self, size: Size, packed: Tensor) -> Recording:
        inputs = packed.to(self._device, copy=True)
        outputs, replay = self._capture(self._step(inputs, size))
        return Recording(inputs, outputs, replay)

    def _step(self, inputs: Tensor, size: Size) -> Callable[[], Outputs]:
        """The computation over `inputs`: it looks at nothing on the host but the size."""
        views = Packed.of(inputs, size)
        starts = torch.arange(size.rows + 1, device=self._device)
        splits = (Splits(views.tiles, views.items, views.rows),)
        kernels, config, pages, last = self.kernels, self.kernels.config, self.pages, self._last

        def work() -> Outputs:
            known = last[views.previous.clamp(min=0)]
            batch = Batch(
                torch.where(views.previous >= 0, known, views.token_ids), views.positions, views.slots,
                views.slots > 0, starts, views.positions + 1, views.block_table, starts[:-1], pages.page_size,
            )  # fmt: skip
            plan = kernels.plan_of(batch, splits)
            residual = kernels.layers(0, config.n_layers, kernels.embed(plan), plan, pages)
            if size.drawing == "no":
                return Outputs(residual, None)
            tokens, valid = draw(kernels.unembed(residual), views.draws, greedy=size.drawing == "greedy")
            return Outputs(residual, torch.stack([tokens, valid.long()]))

        return torch.no_grad()(work)

    def _launched(self, recording: Recording, rows: int) -> Launched:
        """Keep the tokens for the next step, and start their copy to the host."""
        outputs = recording.outputs
        residual = outputs.residual[:rows]
        if outputs.drawn is None:
            return Launched(residual, None, None)
        drawn = outputs.drawn[:, :rows]
        self._last[:rows] = drawn[0]
        if self._device.type != "cuda":
            return Launched(residual, drawn.clone(), None)
        host = torch.empty(drawn.shape, dtype=torch.int64, pin_memory=True)
        host.copy_(drawn, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return Launched(residual, host, done)


class GraphedTransformer(Transformer):
    """A transformer whose steps of one row each are replayed."""

    def __init__(self, graphs: DecodeGraphs) -> None:
        super().__init__(graphs.kernels)
        self._graphs = graphs

    def forward(
        self, batch: Batch, pages: Pages, before_layers: Callable[[], None] = lambda: None, probe: Probe | None = None
    ) -> Tensor:
        """As `Transformer.forward`, of a batch on the host; to be used before the next step is launched."""
        if pages is not self._graphs.pages or not self._graphs.fits(batch) or probe is not None:
            return super().forward(batch, pages, before_layers, probe)
        residual = self._graphs.launch(batch).residual
        before_layers()
        return residual
