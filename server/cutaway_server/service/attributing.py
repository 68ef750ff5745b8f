"""Attribution: the points that it is computed from captured, and the parts of the logit sent in their place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cutaway.v1 import capture_pb2, inference_pb2, sweep_pb2
from cutaway.v1 import introspection_pb2 as v1

from cutaway_server.captures import Captured, Part, Places
from cutaway_server.engine.build import EngineFacts
from cutaway_server.errors import InvalidField
from cutaway_server.probe.attribution import EDITED, Contribution, attribute, directions, needed
from cutaway_server.service.gathering import Gathered
from cutaway_server.service.tensors import chunks, tensor_header
from cutaway_server.text.tokenizer import TextModel


@dataclass(frozen=True, slots=True)
class Choice:
    """The tokens whose logits are taken apart."""

    target: int
    minus: int | None
    neurons: int


def choice_of(request: v1.AttributionRequest, text: TextModel, facts: EngineFacts) -> Choice:
    """Check which logit is meant.

    Raises:
        InvalidField: names the field, the value and the rule.
    """
    if request.generate.sampling.n > 1:
        raise InvalidField("generate.sampling.n", request.generate.sampling.n, "must be 1")
    if not 0 <= request.neurons <= facts.config.d_mlp:
        raise InvalidField("neurons", request.neurons, f"must be at most {facts.config.d_mlp}")
    target = token_of(request.target, "target", text, facts.config.d_vocab)
    minus = token_of(request.minus, "minus", text, facts.config.d_vocab) if request.HasField("minus") else None
    return Choice(target, minus, request.neurons)


def token_of(message: sweep_pb2.TokenChoice, field: str, text: TextModel, d_vocab: int) -> int:
    """The token that a choice names.

    Raises:
        InvalidField: it names none, or several.
    """
    match message.WhichOneof("token"):
        case "id":
            if message.id >= d_vocab:
                raise InvalidField(f"{field}.id", message.id, f"token ids are in [0, {d_vocab})")
            return message.id
        case "text":
            ids = text.encode(message.text, add_special_tokens=False, parse_special_tokens=True).ids
            if len(ids) != 1:
                raise InvalidField(f"{field}.text", message.text, f"must be one token, and is {len(ids)}: {ids[:16]}")
            return int(ids[0])
    raise InvalidField(field, None, "id or text must be set")


def capture_needed(
    asked: inference_pb2.GenerateRequest, positions: capture_pb2.Positions, names: tuple[str, ...]
) -> None:
    """Add a capture of each point."""
    for name in names:
        capture = asked.captures.add(point=name.replace("{i}", "*"), after_edits=name in EDITED)
        if positions.spans or positions.list:
            capture.positions.CopyFrom(positions)
        else:
            capture.positions.spans.add(region=capture_pb2.REGION_LAST)


class Attributing:
    """One answer in the making. All but its making belongs on a worker thread."""

    def __init__(self, choice: Choice, facts: EngineFacts) -> None:
        self._choice, self._facts = choice, facts
        self.names = needed(facts.config, neurons=choice.neurons > 0)

    def messages(self, gathered: Gathered) -> Iterator[inference_pb2.GenerateResponse]:
        """The parts of the logit, as tensors of a stream."""
        config, choice = self._facts.config, self._choice
        along = directions(config, self._facts.weights, choice.target, choice.minus, neurons=choice.neurons > 0)
        values = {name: gathered.values(number) for number, name in enumerate(self.names)}
        made = attribute(config, along, values, choice.neurons)
        positions = gathered.positions(0)
        for number, (part, contribution) in enumerate(made.items()):
            told = _part(part, contribution, positions)
            event = Captured(0, "attribution", None, gathered.step, 0, (told,))
            yield inference_pb2.GenerateResponse(tensor=tensor_header(event, told, number))
            for chunk in chunks(number, told.data):
                yield inference_pb2.GenerateResponse(chunk=chunk)


def _part(name: str, contribution: Contribution, positions: tuple[int, ...]) -> Part:
    values = contribution.values
    axes: list[tuple[str, Places]] = [
        (axis, positions if axis == "pos" else range(size))
        for axis, size in zip(contribution.axes, values.shape, strict=True)
    ]
    return Part(name, "I32" if values.dtype.kind == "i" else "F32", tuple(axes), values)
