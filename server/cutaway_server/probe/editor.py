"""Changes the values of a step that requests edit, for their rows alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cutaway_server.edits import Add, Change, Clamp, Edit, KnockOut, ProjectOut, Scale, Set
from cutaway_server.probe.points import POINTS

BORDERS = ("blocks.{i}.hook_resid_pre", "blocks.{i}.hook_resid_post")
HEADED = {point.name for point in POINTS if {"head", "kv_head"} & set(point.axes[1:])}


@dataclass(frozen=True, slots=True, eq=False)
class Marked:
    """The rows of a step that an edit or a knock-out is about: one sequence's, in ascending order."""

    edit: Edit | KnockOut
    sequence: int  # place in the batch
    rows: tuple[int, ...]  # of the batch
    positions: tuple[int, ...]


class Editor:
    """The edits of one step, in the order in which their requests make them."""

    def __init__(self, marked: Sequence[Marked], device: torch.device) -> None:
        self._device = device
        self._at: defaultdict[tuple[str, int], list[Marked]] = defaultdict(list)
        self._knocked: defaultdict[int, list[Marked]] = defaultdict(list)
        self._inside: set[int] = set()
        for each in marked:
            if isinstance(each.edit, KnockOut):
                for layer in each.edit.layers:
                    self._knocked[layer].append(each)
                    self._inside.add(layer)
                continue
            for layer in each.edit.layers:
                self._at[each.edit.template, layer].append(each)
                if each.edit.template not in BORDERS:
                    self._inside.add(layer)
        self.layers = sorted({*self._knocked, *(layer for _, layer in self._at)})

    def inside(self, layer: int) -> bool:
        """Whether values inside the block are changed, not only those at its borders."""
        return layer in self._inside

    def rows(self, layer: int, names: Iterable[str]) -> list[int]:
        """The rows of the batch, ascending, that are edited at any of these points."""
        return sorted({row for name in names for each in self._at.get((name, layer), ()) for row in each.rows})

    def knocked(self, layer: int) -> list[Marked]:
        """The knock-outs of a layer."""
        return self._knocked.get(layer, [])

    def apply(self, name: str, layer: int, values: Tensor, subset: Tensor | None = None) -> Tensor:
        """A point's values [rows, ...] as edited: rows of the batch, or of its `subset`, ascending.

        They are copied if anything changes.
        """
        marked = self._at.get((name, layer), ())
        if not marked:
            return values
        values = values.clone()
        for each in marked:
            assert isinstance(each.edit, Edit)
            rows = torch.tensor(each.rows, device=self._device)
            if subset is not None:
                rows = torch.searchsorted(subset, rows)
            values[rows] = self._changed(each, values[rows].float()).to(values.dtype)
        return values

    def _changed(self, marked: Marked, values: Tensor) -> Tensor:
        """Values fp32 [rows, (heads,) elements] of the rows marked, with what is selected of them changed."""
        edit = marked.edit
        assert isinstance(edit, Edit)
        headed = values if edit.template in HEADED else values[:, None]
        heads = torch.tensor(edit.heads or range(headed.shape[1]), device=values.device)
        elements = torch.tensor(edit.elements or range(headed.shape[2]), device=values.device)
        block = headed[:, heads][..., elements]
        headed = headed.clone()
        headed[:, heads[:, None], elements] = change(block, edit.change, marked.positions)
        return headed if edit.template in HEADED else headed[:, 0]


def change(block: Tensor, how: Change, positions: Sequence[int]) -> Tensor:
    """A block fp32 [rows, heads, elements] changed."""
    match how:
        case Add(vector):
            return block + _on(block, vector)
        case Scale(factor):
            return block * factor if factor else torch.zeros_like(block)  # 0 x infinity must be 0
        case Set(values, places):
            given = values[np.searchsorted(places, positions)] if places else values
            return _on(block, given).expand_as(block)
        case ProjectOut(basis):
            parts = [_component(block, along)[..., None] * along for along in _on(block, basis)]
            for part in parts:  # one after the other, so that no product's shape depends on other rows
                block = block - part
            return block
        case Clamp(direction, least, most):
            along = _on(block, direction)
            component = _component(block, along)
            return block + (component.clamp(least, most) - component)[..., None] * along
    raise AssertionError(how)


def _component(block: Tensor, along: Tensor) -> Tensor:
    return (block * along).sum(-1)


def _on(block: Tensor, values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Tensor:
    return torch.from_numpy(values).to(block.device)
