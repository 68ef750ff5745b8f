"""Float matrices rounded to integers and scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cutaway_server.kernels.memory import CHUNK_BYTES, give_back
from cutaway_server.kernels.quantized import GROUP, Integers, Kind

# Of the scale at which the largest magnitude is the lowest integer, -8: less cuts it off, and rounds the others finer.
TRIED = (1.0, 0.95, 0.9, 0.85, 0.8, -1.14, -1.05, -0.95)


@dataclass(frozen=True, slots=True)
class Rounded:
    """A float matrix [columns, depth], to be rounded as `kind` says: ROW8, GROUP8 or GROUP4."""

    weight: Tensor
    kind: Kind

    @property
    def shape(self) -> tuple[int, int]:
        """[columns, depth]."""
        return self.weight.shape[0], self.weight.shape[1]

    def integers(self, start: int, stop: int) -> Integers:
        """Those of rows [start, stop)."""
        return ROUND[self.kind](self.weight[start:stop].float())

    def give_back(self, start: int, stop: int) -> None:
        """Return the memory of rows [start, stop), which are never read again."""
        give_back(self.weight[start:stop])

    def free(self) -> None:
        """Return what memory is left."""
        self.weight.untyped_storage().resize_(0)

    def values(self, dtype: torch.dtype) -> Tensor:
        """The rounded weights [columns, depth]."""
        step = max(1, CHUNK_BYTES // (8 * self.shape[1]))
        rows = (self.integers(start, start + step).values() for start in range(0, len(self.weight), step))
        return torch.cat([some[:, : self.shape[1]].to(dtype) for some in rows])


@dataclass(frozen=True, slots=True)
class Rounding:
    """What float matrices become; None: they stay."""

    layers: Kind | None = None
    unembed: Kind | None = None


NO_ROUNDING = Rounding()
ROUNDINGS = {
    "int8": Rounding(Kind.ROW8, Kind.ROW8),
    # What embeds and unembeds in 4 bits costs more than all layers do; it is not read twice a token either.
    "int4": Rounding(Kind.GROUP4, Kind.GROUP8),
}


def _divided(weights: Tensor, scales: Tensor) -> Tensor:
    """Nearest integers to weights / scales, and 0 where the scale is 0."""
    return (weights / torch.where(scales == 0, 1.0, scales)).round_()


def round_rows(weights: Tensor) -> Integers:
    """8 bits, one fp32 scale a row, the largest magnitude 127."""
    scales = weights.abs().amax(1) / 127
    return Integers(Kind.ROW8, (_divided(weights, scales[:, None]) + 128).to(torch.uint8), scales)


def round_groups(weights: Tensor) -> Integers:
    """8 bits, one fp16 scale a group of 32."""
    grouped = _grouped(weights)
    scales = (grouped.abs().amax(2) / 127).half()
    integers = _divided(grouped, scales[..., None].float()).clamp_(-127, 127)
    return Integers(Kind.GROUP8, (integers + 128).to(torch.uint8).flatten(1), scales)


def round_groups_to_four_bits(weights: Tensor) -> Integers:
    """4 bits, one fp16 scale a group of 32: of those tried, the one with the least squared error."""
    grouped = _grouped(weights)
    extreme = grouped.gather(2, grouped.abs().argmax(2, keepdim=True))
    least = torch.full(extreme.shape, torch.inf)
    best, scales = torch.zeros_like(grouped), torch.zeros_like(extreme)
    for share in TRIED:
        scale = (extreme * (-share / 8)).half().float()
        integers = _divided(grouped, scale).clamp_(-8, 7)
        error = (integers * scale - grouped).square_().sum(2, keepdim=True)
        better = error < least
        least, scales = torch.where(better, error, least), torch.where(better, scale, scales)
        best = torch.where(better, integers, best)
    return Integers(Kind.GROUP4, (best + 8).to(torch.uint8).flatten(1), scales[..., 0].half())


def _grouped(weights: Tensor) -> Tensor:
    """[n, groups, 32], the last filled with zeros."""
    return torch.unflatten(F.pad(weights, (0, -weights.shape[1] % GROUP)), 1, (-1, GROUP))


ROUND = {Kind.ROW8: round_rows, Kind.GROUP8: round_groups, Kind.GROUP4: round_groups_to_four_bits}
