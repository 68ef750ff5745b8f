"""Which tokens may be drawn: top-k, top-p, min-p and typical-p, each on what the one before it left.

Sets are those of transformers' TopK-, TopP-, MinP- and TypicalLogitsWarper, but for ties at their edge: here lower ids
go in first and none beyond the edge, so top_k keeps exactly k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cutaway_server.sampler.note import Note, unnoted
from cutaway_server.sampler.order import nearest

# Probabilities relative to the likeliest token, as integers: 2^20 of them fit int64, less than 2^-42 counts as 0.
ONE = 2.0**42


@dataclass(frozen=True, slots=True)
class Filters:
    """The filters of F rows, fp64 [F] each; None where nobody asks."""

    top_p: Tensor | None
    min_p: Tensor | None
    typical_p: Tensor | None


def keep_k(distances: Tensor, top_k: Tensor) -> Tensor:
    """The top_k likeliest tokens, bool [F, N]; distances from the likeliest are fp32 [F, N], in nats."""
    ones = torch.ones_like(distances, dtype=torch.int64)
    everything = top_k == 0
    return nearest(distances, ones, top_k.where(~everything, 1)) | everything[:, None]


def keep(distances: Tensor, kept: Tensor | None, filters: Filters, note: Note = unnoted) -> Tensor:
    """What top-p, min-p and typical-p leave of `kept`, bool [F, N]; notes what each leaves by its name."""
    likelihood = (-distances).exp_()
    if kept is None:
        kept = torch.ones_like(distances, dtype=torch.bool)
    if filters.top_p is not None:
        weights = _weights(likelihood, kept)
        inside = nearest(distances, weights, _share(weights, filters.top_p))
        kept = kept & (inside | (filters.top_p >= 1.0)[:, None])
        note("top_p", kept)
    if filters.min_p is not None:
        kept = kept & (likelihood >= filters.min_p.float()[:, None])
        note("min_p", kept)
    if filters.typical_p is not None:
        inside = _typical(distances, _weights(likelihood, kept), filters.typical_p)
        kept = kept & (inside | (filters.typical_p >= 1.0)[:, None])
        note("typical_p", kept)
    return kept


def _typical(distances: Tensor, weights: Tensor, mass: Tensor) -> Tensor:
    """Those whose surprise is nearest the entropy: the expected surprise, so that both may be told as distances."""
    terms = torch.where(weights > 0, distances, 0.0).double().mul_(weights).round_().long()
    expected = terms.sum(1).double() / weights.sum(1)
    return nearest((distances - expected[:, None]).float().abs_(), weights, _share(weights, mass))


def _weights(likelihood: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, (likelihood * ONE).long(), 0)


def _share(weights: Tensor, mass: Tensor) -> Tensor:
    """The least integer weight that is this mass of the row's."""
    total = weights.sum(1)
    return (total * mass).ceil().long().clamp(min=1).minimum(total)
