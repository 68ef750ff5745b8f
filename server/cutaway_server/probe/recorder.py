"""Takes the values that a step is looked at for, while they are computed, and makes of them what is sent."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from cutaway_server.cache.pages import Pages
from cutaway_server.captures import Captured, Lens, Pool
from cutaway_server.kernels.batch import Batch
from cutaway_server.kernels.interface import OpenKernels
from cutaway_server.probe.group import Group, joined
from cutaway_server.probe.knockout import Knocked
from cutaway_server.probe.looks import Look
from cutaway_server.probe.patterns import Attended, PatternGroup
from cutaway_server.probe.points import POINTS
from cutaway_server.probe.reduce import Outcome, lens, reduce_values, translated

log = logging.getLogger(__name__)

BY_NAME = {point.name: point for point in POINTS}
BORDERS = ("blocks.{i}.hook_resid_pre", "blocks.{i}.hook_resid_post")  # between blocks: no block has to be opened
FINAL = ("ln_final.hook_scale", "ln_final.hook_normalized", "ln_final.hook_out", "logits")
LOGIT_ROWS = 64  # at once: bounds the logits in memory


class Recorder:
    """The looks of one step. The model tells it each value that someone wants, once."""

    def __init__(self, kernels: OpenKernels, looks: Sequence[Look], device: torch.device, step: int) -> None:
        self.kernels, self.step = kernels, step
        self.groups = [
            (PatternGroup if BY_NAME[looks[0].capture.template].keyed else Group)(
                kernels.config, BY_NAME[looks[0].capture.template], looks, device
            )
            for looks in _grouped(looks)
        ]
        self._at: defaultdict[tuple[str, int], list[Group]] = defaultdict(list)
        self._inside: set[int] = set()
        for group in self.groups:
            template = group.capture.template
            for layer in group.capture.layers or (-1,):
                self._at[template, layer].append(group)
                if template not in BORDERS:
                    self._inside.add(layer)
        self.layers = sorted({layer for _, layer in self._at if layer >= 0})

    def inside(self, layer: int) -> bool:
        """Whether values inside the block are wanted, not only those at its borders."""
        return layer in self._inside

    def rows(self, layer: int, names: Iterable[str]) -> list[int]:
        """The rows of the batch, ascending, for which any of these points is wanted."""
        groups = [group for name in names for group in self._at.get((name, layer), ())]
        return sorted({row for group in groups for look in group.looks for row in look.rows})

    def take(
        self, name: str, layer: int, values: Tensor, subset: Tensor | None = None, *, after_edits: bool = False
    ) -> None:
        """Keep what is wanted of a point's values [rows, ...]: rows of the batch, or of its `subset`, ascending.

        `layer` is -1 for points of the model.
        """
        for group in self._at.get((name, layer), ()):
            if group.capture.after_edits == after_edits:
                rows = group.rows if subset is None else group.place(subset)
                group.stash.append(group.selected(values[rows]).float())

    def attend(
        self, layer: int, q: Tensor, lse: Tensor, batch: Batch, pages: Pages, knocked: Sequence[Knocked]
    ) -> None:
        """Keep patterns and scores of the queries looked at, right after a layer's attention."""
        for name in ("blocks.{i}.attn.hook_pattern", "blocks.{i}.attn.hook_attn_scores"):
            for group in self._at.get((name, layer), ()):
                assert isinstance(group, PatternGroup)
                try:
                    if group.error is None:
                        group.take(self.kernels, Attended(layer, q, lse, batch, pages, knocked))
                except RuntimeError as error:  # as out of memory: these looks fail, the step goes on
                    group.error = error

    def finish(self, residual: Tensor) -> None:
        """Keep what is wanted after the last block, of all its rows."""
        for name in FINAL:
            for group in self._at.get((name, -1), ()):
                group.stash.append(residual[group.rows])

    def pieces(self) -> Iterator[tuple[str, Captured | Exception]]:
        """What each look gets, in the order the looks were made; an error for those that failed."""
        found: dict[Look, Captured | Exception] = {}
        for group in self.groups:
            try:
                if group.error is not None:
                    raise group.error
                found |= dict(self._of(group))
            except Exception as error:
                found |= dict.fromkeys(group.looks, error)
        order = sorted(found, key=lambda look: (look.sequence, look.number))
        return ((look.request_id, found[look]) for look in order)

    def _of(self, group: Group) -> Iterator[tuple[Look, Captured]]:
        if isinstance(group.capture.reduction, Pool):
            assert isinstance(group, PatternGroup)
            if (picture := group.picture(self.step)) is not None:
                yield group.looks[0], picture
            return
        yield from group.captured(self._outcome(group), self.step)

    def _outcome(self, group: Group) -> Outcome:
        if isinstance(group, PatternGroup):
            return group.outcome()
        if group.capture.template in FINAL:
            return self._final(group)
        values = torch.stack(group.stash)
        if isinstance(group.capture.reduction, Lens):
            values = translated(group.capture.reduction, values)
            tiles = torch.split(values.flatten(0, 1), LOGIT_ROWS)
            whole = joined([lens(group.capture, self.kernels.unembed(tile)[None]) for tile in tiles], 1)
            parts = {name: torch.unflatten(part[0], 0, values.shape[:2]) for name, part in whole.parts.items()}
            return Outcome(parts, whole.trailing)
        return reduce_values(group.capture, values, group.trailing)

    def _final(self, group: Group) -> Outcome:
        name, found = group.capture.template, []
        for tile in torch.split(group.stash[0], LOGIT_ROWS):
            normed, logits = self.kernels.open_unembed(tile)
            values = dict(zip(FINAL, (normed.scale, normed.normalized, normed.out, logits), strict=True))[name]
            found.append(reduce_values(group.capture, group.selected(values)[None], group.trailing))
        return joined(found, 1)


def _grouped(looks: Sequence[Look]) -> list[list[Look]]:
    """Looks that are computed together: those at patterns only with one row each, so that their keys are a batch."""
    alike: defaultdict[object, list[Look]] = defaultdict(list)
    for look in looks:
        alone = BY_NAME[look.capture.template].keyed and (
            len(look.rows) > 1 or isinstance(look.capture.reduction, Pool)
        )
        alike[look if alone else look.alike].append(look)
    return list(alike.values())
