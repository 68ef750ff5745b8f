"""Selections as the wire has them, checked against what there is: layers, heads, positions, keys."""

from __future__ import annotations

from cutaway.v1 import capture_pb2 as v1

from cutaway_server.captures import Spans
from cutaway_server.errors import InvalidField
from cutaway_server.positions import ENDLESS, Rows

MAX_LISTED = 2**16  # entries of one list
MAX_SPANS = 1024


def indices(message: v1.Indices, size: int, field: str, what: str) -> tuple[int, ...]:
    """The indices listed, ascending and each once; negative ones count from the end.

    Raises:
        InvalidField: there are none, or one is outside.
    """
    if not message.list:
        raise InvalidField(field, [], "must list at least one; leave it unset for all")
    if len(message.list) > MAX_LISTED:
        raise InvalidField(field, f"{len(message.list)} entries", f"at most {MAX_LISTED} are allowed")
    for each in message.list:
        if not -size <= each < size:
            raise InvalidField(
                field, each, f"the model has {size} {what}: 0 to {size - 1}, or -{size} to -1 from the end"
            )
    return tuple(sorted({each % size for each in message.list}))


def rows(message: v1.Positions, field: str, prompt_length: int, computed: int) -> Rows:
    """The positions selected, of a prompt and completions that end before position `computed`.

    Raises:
        InvalidField: a part is impossible, or none is ever computed.
    """
    if not message.spans and not message.list:
        return Rows.everywhere()
    if len(message.spans) > MAX_SPANS or len(message.list) > MAX_LISTED:
        sizes = f"{len(message.spans)} spans, {len(message.list)} positions"
        raise InvalidField(field, sizes, f"at most {MAX_SPANS} spans and {MAX_LISTED} positions are allowed")
    for each in message.list:
        if not -prompt_length <= each < computed:
            rule = f"there are rows 0 to {computed - 1} (the last token has none), and -{prompt_length} to -1 from the "
            raise InvalidField(f"{field}.list", each, rule + "end of the prompt")
    listed = frozenset(each + prompt_length if each < 0 else each for each in message.list)
    spans = tuple(_span(span, f"{field}.spans[{i}]", prompt_length) for i, span in enumerate(message.spans))
    found = Rows(spans, listed)
    if not found.count(0, computed):
        rule = f"selects no row that is computed: there are 0 to {computed - 1}, and the prompt has {prompt_length}"
        raise InvalidField(field, str(message).replace("\n", " ").strip(), rule)
    return found


def _span(span: v1.PositionSpan, field: str, prompt_length: int) -> range:
    start = span.start if span.HasField("start") else 0
    stop = span.stop if span.HasField("stop") else ENDLESS
    if stop <= start:
        raise InvalidField(field, f"[{start}, {stop})", "its stop must be after its start")
    step = span.step or 1
    match span.region:
        case v1.REGION_UNSPECIFIED | v1.REGION_ALL:
            return range(start, stop, step)
        case v1.REGION_PROMPT:
            return range(start, min(stop, prompt_length), step)
        case v1.REGION_GENERATED:
            return range(prompt_length + start, min(prompt_length + stop, ENDLESS), step)
        case v1.REGION_STEPS:
            return range(prompt_length - 1 + start, min(prompt_length - 1 + stop, ENDLESS), step)
        case v1.REGION_LAST:
            if span.HasField("start") or span.HasField("stop") or span.step:
                raise InvalidField(field, "start, stop or step", "must not be set with REGION_LAST, which is one row")
            return range(prompt_length - 1, prompt_length)
    raise InvalidField(f"{field}.region", span.region, "is no region that this server knows")


def spans_of(message: object, field: str) -> Spans:
    """Spans of keys as they are given.

    Raises:
        InvalidField: one is empty, or there are too many.
    """
    spans = tuple((span.start, span.stop) for span in message)  # type: ignore[attr-defined]
    if len(spans) > MAX_SPANS:
        raise InvalidField(field, f"{len(spans)} spans", f"at most {MAX_SPANS} are allowed")
    for i, (start, stop) in enumerate(spans):
        if stop <= start:
            raise InvalidField(f"{field}[{i}]", f"[{start}, {stop})", "its stop must be after its start")
    return spans


def merged(spans: Spans) -> Spans:
    """The same keys in ascending spans that do not touch."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return tuple(found)
