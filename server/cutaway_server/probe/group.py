"""Looks that want the same of different rows: gathered, reduced and brought to the host together, then told apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cutaway_server.architecture import ModelConfig
from cutaway_server.captures import Capture, Captured, Part, Places
from cutaway_server.probe.looks import Look
from cutaway_server.probe.points import Point, size_of
from cutaway_server.probe.reduce import Axes, Outcome

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Group:
    """Looks that are alike, and what has been gathered for them: one outcome for each layer (or one for all).

    Rows of all looks lie one after the other along `row_axis` of every tensor.
    """

    def __init__(self, config: ModelConfig, point: Point, looks: Sequence[Look], device: torch.device) -> None:
        self.config, self.point, self.looks = config, point, looks
        self.capture: Capture = looks[0].capture
        self.rows = torch.tensor([row for look in looks for row in look.rows], device=device)
        self.positions = torch.tensor([p for look in looks for p in look.positions], device=device)
        self.stash: list[Tensor] = []
        self.error: Exception | None = None

    def place(self, subset: Tensor) -> Tensor:
        """Where the group's rows are in `subset`, ascending rows of the batch that contain them."""
        return torch.searchsorted(subset, self.rows)

    def selected(self, values: Tensor) -> Tensor:
        """The heads and elements asked for, of values [rows, ...]."""
        axes = self.point.axes[1:]
        if self.capture.heads is not None:
            axis = 1 + next(i for i, name in enumerate(axes) if name in ("head", "kv_head"))
            values = values.index_select(axis, torch.tensor(self.capture.heads, device=values.device))
        if self.capture.elements is not None:
            values = values.index_select(-1, torch.tensor(self.capture.elements, device=values.device))
        return values

    @property
    def trailing(self) -> Axes:
        """The axes after the rows, as selected."""
        return tuple((name, self._places(name)) for name in self.point.axes[1:])

    def _places(self, axis: str) -> Places:
        if axis in ("head", "kv_head") and self.capture.heads is not None:
            return self.capture.heads
        if axis == self.point.axes[-1] and self.capture.elements is not None:
            return self.capture.elements
        return range(size_of(self.config, axis))

    def captured(self, outcome: Outcome, step: int) -> Iterable[tuple[Look, Captured]]:
        """What each look gets of an outcome [layers, rows, ...], or [layers, heads, rows, ...] of patterns."""
        row_axis = 2 if self.point.keyed else 1
        host = {name: self.on_host(tensor) for name, tensor in outcome.parts.items()}
        start = 0
        for look in self.looks:
            stop = start + len(look.rows)
            parts = []
            for name, (dtype, tensor) in host.items():
                mine = tensor.narrow(row_axis, start, stop - start)
                axes = self._axes(look, outcome.trailing[name])
                if self.point.keyed and axes[-1][0] == "k_pos" and isinstance(axes[-1][1], range):
                    keys = min(mine.shape[-1], look.positions[-1] + 1)  # the group is as wide as its longest
                    mine, axes = mine[..., :keys], (*axes[:-1], ("k_pos", range(keys)))
                elif self.point.keyed and axes[-1][0] == "k_pos":
                    kept = tuple(key for key in axes[-1][1] if key <= look.positions[-1])
                    mine, axes = mine[..., : len(kept)], (*axes[:-1], ("k_pos", kept))
                data = (mine if self.capture.stacked or not self.capture.layers else mine[0]).numpy()
                data = data if self.capture.layers else data[0]
                parts.append(Part(name, dtype, axes, data))
            yield look, Captured(look.number, self.capture.name, look.index, step, look.revisited, tuple(parts))
            start = stop

    def _axes(self, look: Look, trailing: Axes) -> Axes:
        layers: Axes = (("layer", self.capture.layers),) if self.capture.stacked else ()
        if not self.point.keyed:
            return (*layers, ("pos", look.positions), *trailing)
        return (*layers, ("head", self._places("head")), ("q_pos", look.positions), *trailing)

    def on_host(self, tensor: Tensor) -> tuple[str, Tensor]:
        """A tensor as it is sent, and its element type; BF16 as the integers that numpy knows."""
        if tensor.dtype == torch.int32:
            return "I32", tensor.cpu()
        wanted = tensor.to(DTYPES[self.capture.dtype]).cpu()
        return self.capture.dtype, wanted.view(torch.int16) if wanted.dtype == torch.bfloat16 else wanted


def joined(outcomes: Sequence[Outcome], axis: int) -> Outcome:
    """Outcomes of tiles, joined along an axis."""
    if len(outcomes) == 1:
        return outcomes[0]
    parts = {name: torch.cat([each.parts[name] for each in outcomes], axis) for name in outcomes[0].parts}
    return Outcome(parts, outcomes[0].trailing)


def stacked(outcomes: Sequence[Outcome]) -> Outcome:
    """Outcomes of layers, with a new first axis."""
    parts = {name: torch.stack([each.parts[name] for each in outcomes]) for name in outcomes[0].parts}
    return Outcome(parts, outcomes[0].trailing)
