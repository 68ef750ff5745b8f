"""What to read of a request's inner values, as Python says it, put on the wire."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from operator import index
from typing import Literal

import numpy as np
from google.protobuf.message import Message
from numpy.typing import ArrayLike

from cutaway.errors import InvalidArgument
from cutaway.stored import Stored, StoredFile
from cutaway.v1 import capture_pb2 as pb

Region = Literal["all", "prompt", "generated", "steps", "last"]
Positions = Region | int | range | slice | Sequence["Region | int | range"]
Spans = Iterable[tuple[int, int] | range]
Indices = Iterable[int] | int | Literal["all"] | None  # several, one, or all

REGIONS = {
    "all": pb.REGION_ALL,
    "prompt": pb.REGION_PROMPT,
    "generated": pb.REGION_GENERATED,
    "steps": pb.REGION_STEPS,
    "last": pb.REGION_LAST,
}


@dataclass(frozen=True)
class Capture:
    """Values of one point: `Capture("blocks.*.attn.hook_pattern", top_k=32)`.

    `point` is a name of `list_points`, with a layer's number or "*"; with `sae` it may be left out: the point that the
    autoencoder was trained on. At most one reduction may be given.
    """

    point: str = ""
    _: KW_ONLY
    layers: Indices = None  # for a point with "*"; default all
    heads: Indices = None  # default all
    positions: Positions = "all"  # "prompt", "generated", "last", "steps", [5, -1], range(0, 100, 2), or several
    keys: Spans = ()  # of patterns and scores: spans of keys, such as [(0, 4)]; default all
    elements: Indices = None  # places on the last axis, such as neurons; default all
    dtype: Literal["F32", "F16", "BF16"] = "F32"
    top_k: int | None = None  # only the largest, with where they are and the mass they hold
    pool: int | None = None  # each head's pattern over the prompt as so many times so many cells
    norm: bool = False  # Euclidean norm over the last axis
    project: ArrayLike | Stored | None = None  # scalar products with these vectors
    sum_keys: bool = False  # the sum of a pattern over each span of `keys`
    head_summary: bool = False  # the numbers that SUMMARY names, of each head and query
    lens: int | None = None  # a residual read as predictions: so many of the likeliest tokens
    lens_tokens: Iterable[int] = ()  # and the log-probability and rank of these
    translators: StoredFile | str | None = None  # a tuned lens for `lens`: a stored file, or its id
    sae: StoredFile | str | None = None  # a stored autoencoder, or its id: the `top_k` most active features
    after_edits: bool = False  # see the value as the request's own edits of the same point leave it

    def message(self) -> pb.Capture:
        """The wire's capture.

        Raises:
            InvalidArgument: a value does not fit the wire, or there are two reductions.
        """
        made = pb.Capture(point=self.point, dtype=self.dtype, keys=spans(self.keys), after_edits=self.after_edits)
        for name in ("layers", "heads", "elements"):
            put_indices(made, name, getattr(self, name))
        if self.positions != "all":
            made.positions.CopyFrom(positions(self.positions))
        chosen = [name for name in REDUCTIONS if getattr(self, name) is not None and getattr(self, name) is not False]
        if self.lens is None and tuple(self.lens_tokens):
            chosen.append("lens")
        if self.sae is not None and "top_k" in chosen:
            chosen.remove("top_k")
        if len(chosen) > 1:
            raise InvalidArgument(f"captures: {self.point!r} has {' and '.join(chosen)}; give at most one")
        for name in chosen:
            self._put(made, name)
        return made

    def _put(self, made: pb.Capture, name: str) -> None:
        match name:
            case "top_k":
                made.top_k.k = _unsigned("top_k", self.top_k)
            case "pool":
                made.pool.size = _unsigned("pool", self.pool)
            case "project":
                if isinstance(self.project, Stored):
                    made.project.stored.CopyFrom(self.project.message())
                    return
                made.project.vectors = np.atleast_2d(np.asarray(self.project, "<f4")).tobytes()
            case "lens":
                made.lens.CopyFrom(lens(self.lens or 0, self.lens_tokens, self.translators))
            case "sae":
                made.features.sae = self.sae.id if isinstance(self.sae, StoredFile) else str(self.sae)
                made.features.top_k = _unsigned("top_k", FEATURES if self.top_k is None else self.top_k)
            case _:
                getattr(made, name).SetInParent()


# Places on the axis `summary`: entropy in nats, mass on the first and on the previous token, mass on tokens that have
# followed earlier occurrences of the query's own (induction), and how far back the mass lies in the mean.
SUMMARY = ("entropy", "first", "previous", "induction", "distance")
REDUCTIONS = ("top_k", "pool", "norm", "project", "sum_keys", "head_summary", "lens", "sae")
FEATURES = 10  # of an autoencoder, if nothing is said


def lens(top_k: int, token_ids: Iterable[int], translators: StoredFile | str | None = None) -> pb.Lens:
    """The wire's lens."""
    return pb.Lens(
        top_k=_unsigned("top_k", top_k),
        token_ids=[_unsigned("lens_tokens", each) for each in token_ids],
        translators=translators.id if isinstance(translators, StoredFile) else translators or "",
    )


def put_indices(message: Message, field: str, given: Indices) -> None:
    """Set a field of the wire's indices; all of them is what an unset one means.

    Raises:
        InvalidArgument: one is no integer.
    """
    if given is None or (isinstance(given, str) and given == "all"):
        return
    try:
        if isinstance(given, str):
            raise TypeError("must be integers or 'all'")
        several = [given] if isinstance(given, int) else given
        getattr(message, field).CopyFrom(pb.Indices(list=[index(each) for each in several]))
    except (ValueError, TypeError) as error:
        raise InvalidArgument(f"{field}: {given!r} cannot be sent: {error}") from error


def spans(given: Spans) -> list[pb.Span]:
    """The wire's spans of keys, of (start, stop) pairs or ranges."""
    made = []
    for each in given:
        start, stop = (each.start, each.stop) if isinstance(each, range) else each
        made.append(pb.Span(start=_unsigned("keys", start), stop=_unsigned("keys", stop)))
    return made


def positions(given: Positions) -> pb.Positions:
    """The wire's positions: "all", "prompt", "last", [5, 6], range(0, 100, 2), ["last", "generated"], ...

    Raises:
        InvalidArgument: one is nothing of the kind.
    """
    made = pb.Positions()
    several = list(given) if isinstance(given, Iterable) and not isinstance(given, str | range) else [given]
    for each in several:
        if isinstance(each, str):
            if each not in REGIONS:
                raise InvalidArgument(f"positions: {each!r} is none of {', '.join(REGIONS)}")
            made.spans.add(region=REGIONS[each])
        elif isinstance(each, range | slice):
            _add_range(made, each)
        else:
            try:
                made.list.append(index(each))
            except (ValueError, TypeError) as error:
                raise InvalidArgument(f"positions: {each!r} cannot be sent: {error}") from error
    if not several:
        raise InvalidArgument("positions: [] selects nothing")
    return made


def _add_range(made: pb.Positions, given: range | slice) -> None:
    step = given.step or 1
    if step < 1 or min(given.start or 0, 0 if given.stop is None else given.stop) < 0:
        raise InvalidArgument(f"positions: {given!r} must count up from 0 or more")
    span = made.spans.add(region=pb.REGION_ALL, step=step)
    span.start = given.start or 0
    if given.stop is not None:
        span.stop = given.stop


def _unsigned(field: str, value: int | None) -> int:
    if value is None or not 0 <= int(value) < 2**32:
        raise InvalidArgument(f"{field}: {value!r} must be 0 or more")
    return int(value)
