"""One step of sampling. Each row takes the path that its own parameters ask for; nobody pays for another's."""

from __future__ import annotations

import torch
from torch import Tensor

from cutaway_server.sampler.adjust import adjust
from cutaway_server.sampler.batch import SampledBatch, SamplingBatch
from cutaway_server.sampler.draw import distances, draw, invert, likelihoods
from cutaway_server.sampler.filters import Filters, keep, keep_k
from cutaway_server.sampler.logprobs import log_probabilities
from cutaway_server.sampler.note import Note, unnoted
from cutaway_server.sampler.order import HISTOGRAM, highest_places, least
from cutaway_server.sampler.philox import uniforms

# Filtering takes some twenty temporaries of its rows, so rows go in parts of this many elements: what stays in the
# cache of a CPU (4 x faster than all at once), what fills a GPU without filling its memory.
ON_CPU = 2**18
ON_DEVICE = 2**24


def sample(logits: Tensor, batch: SamplingBatch, note: Note = unnoted) -> SampledBatch:
    """Choose one token per row of logits [R, V], which stay as they are.

    Draws go by inverse CDF: in order of ids, or, where top_k is small, from the likeliest down. Greedy rows take the
    likeliest token, the lowest id among equals.

    `note` is told what each stage leaves, so that a batch of one row can be followed (`stages.py`).
    """
    logits = logits.float()
    adjusted = adjust(logits, batch, note)
    note("adjusted", adjusted)
    likeliest = highest_places(adjusted)
    highest = adjusted.gather(1, likeliest[:, None]).squeeze(1)
    valid = highest.abs() < torch.inf  # the highest of a row with NaN is NaN, which compares False
    if adjusted is not logits:
        valid &= logits.amax(1) < torch.inf
    tokens = torch.where(valid, _choose(adjusted, likeliest, highest, batch, note), 0)
    return SampledBatch(tokens, valid, *_score(logits, tokens, batch))


def _choose(logits: Tensor, likeliest: Tensor, highest: Tensor, batch: SamplingBatch, note: Note) -> Tensor:
    parameters, paths = batch.parameters, batch.paths
    if not paths.drawing:
        return likeliest
    tokens = likeliest.clone()
    uniform = uniforms(parameters.seeds, parameters.indices, parameters.positions)
    note("uniform", uniform)
    if (rows := paths.plain) is not None:
        temperature = _pick(parameters.temperature, rows)
        likelihood = likelihoods(_pick(logits, rows), _pick(highest, rows), temperature)
        tokens[rows] = draw(likelihood, _pick(uniform, rows))
    for rows, path in ((paths.short, _short), (paths.long, _long)):
        if rows is not None:
            below = distances(_pick(logits, rows), _pick(highest, rows), _pick(parameters.temperature, rows))
            tokens[rows] = path(below, _pick(uniform, rows), rows, batch, note)
    return tokens


def _short(below: Tensor, uniform: Tensor, rows: Tensor, batch: SamplingBatch, note: Note) -> Tensor:
    candidates, places = least(below, batch.paths.longest_short)
    rank = torch.arange(candidates.shape[1], device=rows.device)
    inside = rank < _pick(batch.parameters.top_k, rows)[:, None]
    note("places", places)
    note("top_k", inside)
    kept = keep(candidates, inside, _filters(rows, batch), note)
    place, _ = invert((-candidates).exp_().mul_(kept), uniform)
    return places.gather(1, place[:, None]).squeeze(1)


def _long(below: Tensor, uniform: Tensor, rows: Tensor, batch: SamplingBatch, note: Note) -> Tensor:
    at_once = max(1, (ON_CPU if below.device.type == "cpu" else ON_DEVICE) // max(below.shape[1], HISTOGRAM))
    parts = [slice(start, start + at_once) for start in range(0, len(rows), at_once)]
    return torch.cat([_long_part(below[part], uniform[part], rows[part], batch, note) for part in parts])


def _long_part(below: Tensor, uniform: Tensor, rows: Tensor, batch: SamplingBatch, note: Note) -> Tensor:
    kept = keep_k(below, _pick(batch.parameters.top_k, rows)) if batch.paths.any_long_k else None
    if kept is not None:
        note("top_k", kept)
    kept = keep(below, kept, _filters(rows, batch), note)
    return draw(below.neg_().exp_().mul_(kept), uniform)


def _filters(rows: Tensor, batch: SamplingBatch) -> Filters:
    parameters, paths = batch.parameters, batch.paths
    return Filters(
        _pick(parameters.top_p, rows) if paths.any_top_p else None,
        _pick(parameters.min_p, rows) if paths.any_min_p else None,
        _pick(parameters.typical_p, rows) if paths.any_typical_p else None,
    )


def _score(
    logits: Tensor, tokens: Tensor, batch: SamplingBatch
) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
    """Log-probabilities of the rows that want them, in their places among all rows."""
    if batch.logprobs is None or batch.scored is None:
        return None, None, None
    scored = log_probabilities(_pick(logits, batch.scored), _pick(tokens, batch.scored), batch.logprobs)
    if len(batch.scored) == len(tokens):
        return scored
    logprobs, top_tokens, top_logprobs = (part.new_zeros(len(tokens), *part.shape[1:]) for part in scored)
    for whole, part in zip((logprobs, top_tokens, top_logprobs), scored, strict=True):
        whole[batch.scored] = part
    return logprobs, top_tokens, top_logprobs


def _pick(values: Tensor, rows: Tensor) -> Tensor:
    """The rows asked for; no copy where they are all."""
    return values if len(rows) == len(values) else values[rows]
