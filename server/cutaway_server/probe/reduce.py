"""Selected values of some rows, reduced to what was asked for. A row's result does not depend on other rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cutaway_server.captures import (
    SUMMARIES,
    Capture,
    Features,
    HeadSummary,
    Lens,
    Norm,
    Places,
    Project,
    SumKeys,
    TopK,
)
from cutaway_server.kernels.linear import linear
from cutaway_server.probe.features import features

Parts = dict[str, Tensor]
Axes = tuple[tuple[str, Places], ...]

NO_KEY = -1


@dataclass(frozen=True, slots=True)
class Outcome:
    """Tensors by the name of their part, and what follows their layer and row axes."""

    parts: Parts
    trailing: dict[str, Axes]


def reduce_values(capture: Capture, values: Tensor, trailing: Axes) -> Outcome:
    """Reduce the last axis of values fp32 [layers, rows, ...] that are no patterns; `trailing` are the axes after rows.

    Heads and elements are selected already.
    """
    match capture.reduction:
        case None:
            return Outcome({"": values}, {"": trailing})
        case TopK(k):
            places = torch.tensor(trailing[-1][1], dtype=torch.int32, device=values.device)
            return _largest(values, k, places, trailing[:-1])
        case Norm():
            return Outcome({"": values.norm(dim=-1)}, {"": trailing[:-1]})
        case Project(vectors):
            products = values @ torch.from_numpy(vectors).to(values.device).T
            return Outcome({"": products}, {"": (*trailing[:-1], ("vector", range(len(vectors))))})
        case Features(sae, top_k):
            joined = values.flatten(2)
            parts = features(sae, top_k, joined.flatten(0, 1))
            shaped = {name: torch.unflatten(part, 0, joined.shape[:2]) for name, part in parts.items()}
            axes: Axes = (("top", range(top_k)),)
            return Outcome(shaped, {"values": axes, "indices": axes, "active": ()})
    raise AssertionError(f"{capture.reduction} is of patterns, or is the lens")


def _largest(values: Tensor, k: int, places: Tensor, before: Axes) -> Outcome:
    """The k largest by magnitude, where they were, and their share of all magnitudes."""
    magnitudes = values.abs()
    kept, found = magnitudes.topk(min(k, values.shape[-1]), dim=-1)
    total = magnitudes.sum(-1)
    mass = torch.where(total > 0, kept.sum(-1) / total, 1.0)
    axes = (*before, ("top", range(found.shape[-1])))
    parts = {"values": values.gather(-1, found), "indices": places[found], "mass": mass}
    return Outcome(parts, {"values": axes, "indices": axes, "mass": before})


def translated(how: Lens, values: Tensor) -> Tensor:
    """Residuals fp32 [layers, rows, d_model], each through its layer's translator of a tuned lens, if it has one."""
    if not how.translators:
        return values
    made = []
    for residual, translator in zip(values, how.translators, strict=True):
        if translator is not None:
            weight, bias = (torch.from_numpy(each).to(values.device) for each in (translator.weight, translator.bias))
            residual = residual + linear(residual, weight, bias)
        made.append(residual)
    return torch.stack(made)


def lens(capture: Capture, logits: Tensor) -> Outcome:
    """What logits fp32 [layers, rows, vocab] say: the likeliest tokens, and how likely the given ones are."""
    assert isinstance(capture.reduction, Lens)
    logprobs = torch.log_softmax(logits, -1)
    parts: Parts = {}
    trailing: dict[str, Axes] = {}
    if capture.reduction.top_k:
        top = logprobs.topk(capture.reduction.top_k, dim=-1)
        parts |= {"tokens": top.indices.int(), "logprobs": top.values}
        trailing |= dict.fromkeys(("tokens", "logprobs"), (("top", range(capture.reduction.top_k)),))
    if capture.reduction.token_ids:
        given = logprobs[..., torch.tensor(capture.reduction.token_ids, device=logits.device)]
        ranks = torch.stack([(logprobs > each[..., None]).sum(-1) for each in given.unbind(-1)], -1)
        parts |= {"given_logprobs": given, "given_ranks": ranks.int()}
        named = (("token", capture.reduction.token_ids),)
        trailing |= dict.fromkeys(("given_logprobs", "given_ranks"), named)
    return Outcome(parts, trailing)


@dataclass(frozen=True, slots=True)
class Queries:
    """Which queries patterns are of. Tensors are on the patterns' device."""

    positions: Tensor  # [rows]
    follows: Tensor | None  # bool [rows, keys]: the key comes after an earlier occurrence of the query's token


def reduce_pattern(capture: Capture, values: Tensor, queries: Queries) -> Outcome:
    """Reduce patterns or scores fp32 [heads, rows, keys], all keys from position 0 on.

    A part of the outcome is [heads, rows, ...]; `trailing` are the axes after rows.
    """
    columns = selected_keys(capture, values.shape[-1])
    match capture.reduction:
        case None:
            values = values if columns is None else values[..., torch.tensor(columns, device=values.device)]
            keys = range(values.shape[-1]) if columns is None else tuple(columns)
            return Outcome({"": values}, {"": (("k_pos", keys),)})
        case TopK(k):
            return _largest_keys(capture, values, columns, k)
        case SumKeys():
            sums = [values[..., start:stop].sum(-1) for start, stop in capture.keys]
            return Outcome({"": torch.stack(sums, -1)}, {"": (("span", range(len(sums))),)})
        case HeadSummary():
            return Outcome({"": _summary(values, queries)}, {"": (("summary", range(len(SUMMARIES))),)})
    raise AssertionError(f"{capture.reduction} is not of single patterns")


def selected_keys(capture: Capture, keys: int) -> list[int] | None:
    """The keys asked for, of those that there are; None: all."""
    if not capture.keys:
        return None
    return [key for start, stop in capture.keys for key in range(start, min(stop, keys))]


def _largest_keys(capture: Capture, values: Tensor, columns: list[int] | None, k: int) -> Outcome:
    places = torch.arange(values.shape[-1], dtype=torch.int32, device=values.device)
    if columns is not None:
        places = places[columns]
        values = values[..., places]
    top, found = values.topk(min(k, values.shape[-1]), dim=-1)
    seen = top > (0.0 if capture.template.endswith("hook_pattern") else -torch.inf)
    top, indices = top.masked_fill(~seen, 0.0), places[found].masked_fill(~seen, NO_KEY)
    if missing := k - top.shape[-1]:
        top = torch.nn.functional.pad(top, (0, missing))
        indices = torch.nn.functional.pad(indices, (0, missing), value=NO_KEY)
    axes: Axes = (("top", range(k)),)
    parts, trailing = {"values": top, "indices": indices}, {"values": axes, "indices": axes}
    if capture.template.endswith("hook_pattern"):
        parts["mass"], trailing["mass"] = top.sum(-1), ()
    return Outcome(parts, trailing)


def _summary(pattern: Tensor, queries: Queries) -> Tensor:
    """Entropy, mass on the first token and on the one before, induction score, mean distance: [heads, rows, 5]."""
    assert queries.follows is not None
    entropy = -torch.xlogy(pattern, pattern).sum(-1)
    before = (queries.positions - 1).clamp(min=0)
    previous = pattern.gather(-1, before[None, :, None].expand(len(pattern), -1, 1)).squeeze(-1)
    previous = previous.masked_fill(queries.positions == 0, 0.0)
    induction = (pattern * queries.follows).sum(-1)
    distances = queries.positions[:, None] - torch.arange(pattern.shape[-1], device=pattern.device)
    return torch.stack([entropy, pattern[..., 0], previous, induction, (pattern * distances).sum(-1)], -1)
