"""How many bytes captures send at most. Every call is guarded by this, and Estimate tells it."""

from __future__ import annotations

from cutaway_server.architecture import ModelConfig
from cutaway_server.captures import SUMMARIES, Capture, Features, HeadSummary, Lens, Norm, Pool, Project, SumKeys, TopK
from cutaway_server.probe.points import POINTS, Cost, size_of

INDEX_BYTES = 4
BY_NAME = {point.name: point for point in POINTS}


def capture_bytes(config: ModelConfig, capture: Capture, prompt_length: int, max_tokens: int, n: int) -> int:
    """The most bytes that a capture sends for a prompt and `n` completions of `max_tokens` tokens."""
    item = 4 if capture.dtype == "F32" else 2
    layers = max(1, len(capture.layers))
    heads = _heads(config, capture)
    if isinstance(capture.reduction, Pool):
        return layers * heads * min(capture.reduction.size, prompt_length) ** 2 * item
    end = prompt_length + max(0, max_tokens - 1)  # the last token is never computed
    prompt_rows, rows = capture.rows.count(0, prompt_length), n * capture.rows.count(prompt_length, end)
    if not BY_NAME[capture.template].keyed:
        return layers * (prompt_rows + rows) * _row(config, capture, item)
    by_prompt = prompt_rows * _query(capture, prompt_length, item)
    return layers * heads * (by_prompt + rows * _query(capture, end, item))


def _heads(config: ModelConfig, capture: Capture) -> int:
    axes = BY_NAME[capture.template].axes
    name = next((axis for axis in axes if axis in ("head", "kv_head")), None)
    if name is None:
        return 1
    return size_of(config, name) if capture.heads is None else len(capture.heads)


def _row(config: ModelConfig, capture: Capture, item: int) -> int:
    """Bytes of one row of values that are no patterns."""
    axes = BY_NAME[capture.template].axes[1:]
    outer = 1
    for axis in axes[:-1]:
        outer *= _heads(config, capture) if axis in ("head", "kv_head") else size_of(config, axis)
    last = size_of(config, axes[-1])
    if axes[-1] == "head":
        last = _heads(config, capture)
    if capture.elements is not None:
        last = len(capture.elements)
    match capture.reduction:
        case TopK(k):
            return outer * (min(k, last) * (item + INDEX_BYTES) + item)
        case Norm():
            return outer * item
        case Project(vectors):
            return outer * len(vectors) * item
        case Lens(top_k, token_ids):
            return (top_k + len(token_ids)) * (item + INDEX_BYTES)
        case Features(_, top_k):
            return top_k * (item + INDEX_BYTES) + INDEX_BYTES
    return outer * last * item


def _query(capture: Capture, keys: int, item: int) -> int:
    """Bytes of one query of a head that may see so many keys."""
    match capture.reduction:
        case TopK(k):
            return k * (item + INDEX_BYTES) + item
        case SumKeys():
            return len(capture.keys) * item
        case HeadSummary():
            return len(SUMMARIES) * item
    selected = sum(min(stop, keys) - min(start, keys) for start, stop in capture.keys) if capture.keys else keys
    return selected * item


def open_layers(captures: tuple[Capture, ...]) -> int:
    """In how many layers an operation is computed a second time."""
    opened = (Cost.OPEN, Cost.MATRIX)
    return len({layer for capture in captures if BY_NAME[capture.template].cost in opened for layer in capture.layers})
