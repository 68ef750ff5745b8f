"""Attention patterns and scores of the queries looked at, taken right after a layer's attention."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from cutaway_server.captures import Captured, HeadSummary, Part, Pool
from cutaway_server.probe.attention import Reader, tiles
from cutaway_server.probe.group import Group, joined, stacked
from cutaway_server.probe.knockout import Knocked
from cutaway_server.probe.reduce import Axes, Outcome, Queries, reduce_pattern


class PatternGroup(Group):
    """Looks at patterns that are alike: either one look, or looks of one row each, computed together."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.outcomes: list[Outcome] = []
        self.knocked: Sequence[Knocked] = ()  # of the layer that is being taken
        self.sequences = torch.tensor(
            [look.sequence for look in self.looks for _ in look.rows], device=self.rows.device
        )
        self.heads = torch.tensor(self.capture.heads or range(self.config.n_heads), device=self.rows.device)

    def take(self, reader: Reader, q: Tensor, lse: Tensor, knocked: Sequence[Knocked]) -> None:
        """Take what a layer's attention computed of queries q [T, heads, d_head] with log-sum-exps [T, heads]."""
        self.knocked = knocked
        q, lse = q[self.rows][:, self.heads].float(), lse[self.rows][:, self.heads].T  # [heads, rows]
        if isinstance(self.capture.reduction, Pool):
            self._pool(reader, q, lse)
            return
        per_row = len(self.heads) * (int(self.positions.max()) + 1)
        found = [self._tile(reader, q, lse, part) for part in tiles(len(q), per_row)]
        self.outcomes.append(joined(_widened(found), 1))

    def outcome(self) -> Outcome:
        """Everything taken, of all layers."""
        return stacked(self.outcomes)

    def _tile(self, reader: Reader, q: Tensor, lse: Tensor, part: slice) -> Outcome:
        values = self._values(reader, q[part], lse[:, part], part)
        return reduce_pattern(self.capture, values, Queries(self.positions[part], self._follows(part, values)))

    def _values(self, reader: Reader, q: Tensor, lse: Tensor, part: slice) -> Tensor:
        """Patterns, or scores, [heads, rows, keys]."""
        positions = self.positions[part]
        if len(self.looks) == 1:
            scores = reader.scores(q, self.looks[0].sequence, positions, self.heads)
        else:
            scores = reader.scores_of_each(q, self.sequences[part], positions, self.heads)
        self._knock_out(scores, part)
        if not self.point.name.endswith("hook_pattern"):
            return scores
        return torch.exp(scores - lse[..., None])

    def _knock_out(self, scores: Tensor, part: slice) -> None:
        """Add what knock-outs add to the scores [heads, rows, keys] of these rows."""
        rows = self.rows[part]
        for each in self.knocked:
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

    def _pool(self, reader: Reader, q: Tensor, lse: Tensor) -> None:
        look = self.looks[0]
        assert isinstance(self.capture.reduction, Pool)
        assert look.pooled is not None
        size = min(self.capture.reduction.size, look.prompt_length)
        cells = look.pooled.cells.setdefault(reader.layer, torch.zeros(len(self.heads), size, size, device=q.device))
        for part in tiles(len(q), len(self.heads) * look.prompt_length):
            pattern = self._values(reader, q[part], lse[:, part], part)
            keys = cell_of(torch.arange(pattern.shape[-1], device=q.device), size, look.prompt_length)
            by_key = pattern.new_zeros(*pattern.shape[:2], size).index_add_(2, keys, pattern)
            cells.index_add_(1, cell_of(self.positions[part], size, look.prompt_length), by_key)

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
