"""Attention patterns and scores of the queries looked at, taken right after a layer's attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from cutaway_server.cache.pages import Pages
from cutaway_server.captures import Captured, HeadSummary, Part, Pool
from cutaway_server.kernels.batch import Batch
from cutaway_server.kernels.interface import OpenKernels
from cutaway_server.kernels.plan import Plan
from cutaway_server.probe.group import Group, joined, stacked
from cutaway_server.probe.knockout import Knocked
from cutaway_server.probe.reduce import Axes, Outcome, Queries, reduce_pattern

SCORES_AT_ONCE = 2**24  # elements of one tile: 64 MiB in fp32


@dataclass(frozen=True, slots=True, eq=False)
class Attended:
    """What a layer's attention took and left: q [T, heads, d_head], log-sum-exps [T, heads], what was knocked out."""

    layer: int
    q: Tensor
    lse: Tensor
    batch: Batch
    pages: Pages
    knocked: Sequence[Knocked]


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """Some of a group's rows, as a batch of their own."""

    part: slice
    plan: Plan
    width: int  # keys, as many as its last query may see


class PatternGroup(Group):
    """Looks at patterns that are alike: either one look, or looks of one row each, computed together."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.outcomes: list[Outcome] = []
        self.heads = torch.tensor(self.capture.heads or range(self.config.n_heads), device=self.rows.device)
        self._tiles: list[Tile] = []  # the same for all layers

    def take(self, kernels: OpenKernels, attended: Attended) -> None:
        """Take what a layer's attention computed."""
        if not self._tiles:
            self._tiles = list(self._made(kernels, attended.batch))
        if isinstance(self.capture.reduction, Pool):
            self._pool(kernels, attended)
            return
        self.outcomes.append(joined(_widened([self._tile(kernels, attended, tile) for tile in self._tiles]), 1))

    def _made(self, kernels: OpenKernels, batch: Batch) -> Iterator[Tile]:
        per_row = self.config.n_heads * (int(self.positions.max()) + 1)
        step = max(1, SCORES_AT_ONCE // per_row)
        for start in range(0, len(self.rows), step):
            part = slice(start, min(start + step, len(self.rows)))
            width = int(self.positions[part].max()) + 1
            yield Tile(part, kernels.plan(batch.chosen(self.rows[part], together=len(self.looks) == 1)), width)

    def outcome(self) -> Outcome:
        """Everything taken, of all layers."""
        return stacked(self.outcomes)

    def _tile(self, kernels: OpenKernels, attended: Attended, tile: Tile) -> Outcome:
        values = self._values(kernels, attended, tile)
        return reduce_pattern(
            self.capture, values, Queries(self.positions[tile.part], self._follows(tile.part, values))
        )

    def _values(self, kernels: OpenKernels, attended: Attended, tile: Tile) -> Tensor:
        """Patterns, or scores, [heads, rows, keys]."""
        rows = self.rows[tile.part]
        q, lse = attended.q[rows].float(), attended.lse[rows]
        whole = self.point.name.endswith("hook_pattern")
        direct = lse if whole and not attended.knocked else None
        values = kernels.patterns(attended.layer, q, direct, tile.plan, attended.pages, tile.width)
        if self.capture.heads is not None:
            values = values[self.heads]
        if attended.knocked:
            self._knock_out(values, tile.part, attended.knocked)
            if whole:
                values = torch.exp(values - lse[:, self.heads].T[..., None])
        return values

    def _knock_out(self, scores: Tensor, part: slice, knocked: Sequence[Knocked]) -> None:
        """Add what knock-outs add to the scores [heads, rows, keys] of these rows."""
        rows = self.rows[part]
        for each in knocked:
            mine = torch.isin(rows, each.rows).nonzero().squeeze(1)
            if len(mine):
                theirs = torch.searchsorted(each.rows, rows[mine])
                bias = each.bias[self.heads][:, theirs, : scores.shape[-1]]
                scores[:, mine, : bias.shape[-1]] += bias

    def _follows(self, part: slice, values: Tensor) -> Tensor | None:
        if not isinstance(self.capture.reduction, HeadSummary):
            return None
        rows = [(look, position) for look in self.looks for position in look.positions][part]
        follows = np.zeros((len(rows), values.shape[-1]), np.bool_)
        for look, those in groupby(enumerate(rows), key=lambda row: row[1][0]):
            tokens = np.array(look.tokens[: values.shape[-1]])
            for place, (_, position) in those:
                follows[place, 1 : position + 1] = tokens[:position] == tokens[position]
        return torch.from_numpy(follows).to(values.device)

    def _pool(self, kernels: OpenKernels, attended: Attended) -> None:
        look = self.looks[0]
        assert isinstance(self.capture.reduction, Pool)
        assert look.pooled is not None
        size, device = min(self.capture.reduction.size, look.prompt_length), attended.q.device
        cells = look.pooled.cells.setdefault(attended.layer, torch.zeros(len(self.heads), size, size, device=device))
        for tile in self._tiles:
            pattern = self._values(kernels, attended, tile)
            keys = cell_of(torch.arange(tile.width, device=device), size, look.prompt_length)
            by_key = pattern.new_zeros(*pattern.shape[:2], size).index_add_(2, keys, pattern)
            cells.index_add_(1, cell_of(self.positions[tile.part], size, look.prompt_length), by_key)

    def picture(self, step: int) -> Captured | None:
        """The finished picture [layers, heads, size, size] of the look; None while prompt rows are missing."""
        look = self.looks[0]
        assert look.pooled is not None
        if look.positions[-1] < look.prompt_length - 1:
            return None
        cells = torch.stack([look.pooled.cells[layer] for layer in self.capture.layers])
        size, places = cells.shape[-1], torch.arange(look.prompt_length, device=cells.device)
        queries = torch.bincount(cell_of(places, size, look.prompt_length))
        dtype, tensor = self.on_host(cells / queries[:, None])
        axes: Axes = (("head", self._places("head")), ("q_cell", range(size)), ("k_cell", range(size)))
        if self.capture.stacked:
            axes = (("layer", self.capture.layers), *axes)
        part = Part("", dtype, axes, (tensor if self.capture.stacked else tensor[0]).numpy())
        return Captured(look.number, self.capture.name, look.index, step, look.revisited, (part,))


def cell_of(positions: Tensor, size: int, length: int) -> Tensor:
    """Which of `size` cells of a prompt each position is in."""
    return positions * size // length


def _widened(outcomes: list[Outcome]) -> list[Outcome]:
    """Tiles' patterns end with their last query's own key: zeros, or -inf for scores, follow it."""
    if len(outcomes) == 1 or outcomes[0].trailing.get("", (("", ()),))[-1][0] != "k_pos":
        return outcomes
    widest = max(outcomes, key=lambda outcome: outcome.parts[""].shape[-1])
    fill = -torch.inf if any(torch.isneginf(each.parts[""]).any() for each in outcomes) else 0.0
    wide = widest.parts[""].shape[-1]
    padded = [torch.nn.functional.pad(o.parts[""], (0, wide - o.parts[""].shape[-1]), value=fill) for o in outcomes]
    return [Outcome({"": part}, widest.trailing) for part in padded]
