"""SelfCheck: a prompt computed like anybody's, everything captured, and what must hold tested on it."""

from __future__ import annotations

import numpy as np
from cutaway.v1 import inference_pb2
from cutaway.v1 import introspection_pb2 as v1
from numpy.typing import NDArray

from cutaway_server.engine.build import EngineFacts
from cutaway_server.errors import InvalidField
from cutaway_server.probe.identities import NEEDED, identities
from cutaway_server.probe.points import points_of

LONGEST = 256  # tokens: bounds the patterns
DEFAULT_LENGTH = 24


def check_request(asked: inference_pb2.GenerateRequest, facts: EngineFacts) -> inference_pb2.GenerateRequest:
    """The request that is computed: the caller's prompt, or one that is picked, with every point captured.

    Raises:
        InvalidField: it has captures or edits of its own.
    """
    for name, given in (("captures", asked.captures), ("edits", asked.edits)):
        if given:
            raise InvalidField(f"generate.{name}", f"{len(given)} entries", "must not be set: the model is tested")
    made = inference_pb2.GenerateRequest()
    made.CopyFrom(asked)
    made.ClearField("max_capture_bytes")
    if made.WhichOneof("prompt") is None:
        step = max(1, facts.config.d_vocab // DEFAULT_LENGTH)
        length = min(DEFAULT_LENGTH, facts.max_context - 1)
        made.token_ids.ids.extend((7 + i * step) % facts.config.d_vocab for i in range(length))
    made.sampling.max_tokens, made.sampling.n, made.sampling.logprobs = 1, 1, 1
    made.sampling.temperature = 0.0
    made.ClearField("echo")
    for point in points_of(facts.config):
        if point.name in NEEDED:
            made.captures.add(point=point.name.replace("{i}", "*"))
    return made


class Gathered:
    """What a stream of captures brought, by template, whole."""

    def __init__(self, facts: EngineFacts) -> None:
        self._templates = [point.name for point in points_of(facts.config) if point.name in NEEDED]
        self._headers: dict[int, tuple[str, tuple[int, ...], int, str]] = {}
        self._data: dict[int, bytearray] = {}
        self._pieces: dict[str, list[NDArray[np.float32]]] = {}
        self._rows: dict[str, int] = {}
        self.prompt_tokens = 0
        self.token: inference_pb2.Token | None = None

    def take(self, message: inference_pb2.GenerateResponse) -> None:
        """Take one message of the stream."""
        match message.WhichOneof("event"):
            case "started":
                self.prompt_tokens = message.started.prompt_tokens
            case "tensor":
                header = message.tensor
                self._headers[header.id] = (
                    self._templates[header.capture], tuple(axis.size for axis in header.axes), header.bytes,
                    " ".join(axis.name for axis in header.axes),
                )  # fmt: skip
                self._data[header.id] = bytearray()
            case "chunk":
                self._data[message.chunk.id] += message.chunk.data
                self._whole(message.chunk.id)
            case "delta":
                self.token = message.delta.tokens[0]
            case _:
                pass

    def _whole(self, number: int) -> None:
        name, shape, size, axes = self._headers[number]
        if len(self._data[number]) == size:
            piece = np.frombuffer(self._data.pop(number), "<f4").reshape(shape)
            self._rows[name] = next(i for i, axis in enumerate(axes.split()) if axis in ("pos", "q_pos"))
            self._pieces.setdefault(name, []).append(piece)

    def values(self) -> dict[str, NDArray[np.float32]]:
        """Each point's values; patterns of earlier chunks are as wide as those of the last."""
        found = {}
        for name, pieces in self._pieces.items():
            if name.endswith(("hook_pattern", "hook_attn_scores")):
                fill = 0.0 if name.endswith("hook_pattern") else -np.inf
                wide = max(piece.shape[-1] for piece in pieces)
                padding = [(0, 0)] * (pieces[0].ndim - 1)
                pieces = [
                    np.pad(piece, [*padding, (0, wide - piece.shape[-1])], constant_values=fill) for piece in pieces
                ]
            found[name] = np.concatenate(pieces, self._rows[name])
        return found


def told(gathered: Gathered, facts: EngineFacts) -> v1.SelfCheckResponse:
    """The answer to SelfCheck."""
    values, token = gathered.values(), gathered.token
    assert token is not None, "one token was asked for"
    found = list(identities(facts.config, values, facts.kv_dtype, token.id, token.logprob))
    return v1.SelfCheckResponse(
        identities=[
            v1.Identity(
                name=each.name, description=each.description, error=each.error, tolerance=each.tolerance,
                holds=each.holds, exact=each.exact,
            )
            for each in found
        ],
        holds=all(each.holds for each in found), model_hash=facts.model_hash, kernels=facts.kernels, dtype=facts.dtype,
        quantization=facts.quantization, prompt_tokens=gathered.prompt_tokens,
    )  # fmt: skip
