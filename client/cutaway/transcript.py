"""What one stream has told so far: the part that the synchronous and the asynchronous stream share."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import replace
from typing import TYPE_CHECKING

from cutaway import replies
from cutaway.errors import Cancelled, CutawayError, ServerError
from cutaway.results import Answer, Completion, PromptToken, Started, Timings, Token, Usage
from cutaway.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from cutaway.arrays import Arrays
    from cutaway.receiving import Received, Receiver
    from cutaway.v1 import introspection_pb2 as looking

    Response = (
        pb.GenerateResponse
        | looking.TraceResponse
        | looking.GetHiddenStatesResponse
        | looking.GetAttentionResponse
        | looking.LogitLensResponse
        | looking.AttributionResponse
        | looking.ForkResponse
    )


class Transcript:
    """What a stream has told so far: None is "not told yet"."""

    def __init__(self, request_id: str) -> None:
        self.request_id: str | None = request_id or None
        self.started: Started | None = None
        self.completions: tuple[Completion, ...] | None = None
        self.usage: Usage | None = None
        self.timings: Timings | None = None
        self._prompt: list[PromptToken] = []
        self._tokens: defaultdict[int, list[Token]] = defaultdict(list)
        self._pending: deque[Token] = deque()  # received, not given to the caller yet
        self._closed = False
        self._receiver: Receiver | None = None
        self._pieces: list[Received] = []  # everything captured
        self._fresh: defaultdict[int | None, list[Received]] = defaultdict(list)  # since the last token; None: prompt

    @property
    def captures(self) -> Arrays:
        """What was captured so far, of the prompt and of completion 0, by canonical name: whole arrays."""
        from cutaway.seen import assembled

        return assembled(piece for piece in self._pieces if piece.header.index == 0)

    @property
    def prompt_logprobs(self) -> tuple[PromptToken, ...] | None:
        """The prompt's tokens with log-probabilities, if asked for; complete once the first token is here."""
        return tuple(self._prompt) or None

    @property
    def text(self) -> str:
        """The text of completion 0 so far."""
        return "".join(token.text for token in self._tokens[0])

    def answer(self) -> Answer:
        """Everything that the stream brought.

        Raises:
            CutawayError: the stream has not been read to its end.
        """
        if self.started is None or self.completions is None or self.usage is None or self.timings is None:
            raise self._ended_early()
        seen = self.captures if self._pieces else {}
        return Answer(self.started, self.completions, self.prompt_logprobs, self.usage, self.timings, seen)

    def _take(self, message: Response) -> None:
        if not isinstance(message, pb.GenerateResponse):
            message = message.event
        match message.WhichOneof("event"):
            case "started":
                self.started = replies.flat(Started, message.started)
                self.request_id = self.started.request_id
            case "prompt_logprobs":
                self._prompt.extend(replies.prompt_tokens(message.prompt_logprobs))
            case "delta":
                self._take_delta(message.delta)
            case "finished":
                self._finish(message.finished)
            case "tensor":
                self._keep(self._tensors.header(message.tensor))
            case "chunk":
                self._keep(self._tensors.chunk(message.chunk))
            case _:
                pass  # an event of a later version of the protocol

    def _take_delta(self, delta: pb.Delta) -> None:
        tokens = [replies.token(wire, delta.index) for wire in delta.tokens]
        if self._pieces and tokens:
            tokens[0] = replace(tokens[0], captures=self._led_to(delta.index))
        self._tokens[delta.index].extend(tokens)
        self._pending.extend(tokens)

    @property
    def _tensors(self) -> Receiver:
        """Made for the first tensor: it needs numpy, which is slow to load."""
        if self._receiver is None:
            from cutaway.receiving import Receiver

            self._receiver = Receiver(self.started.model_hash if self.started is not None else "")
        return self._receiver

    def _keep(self, received: Received | None) -> None:
        if received is not None:
            self._pieces.append(received)
            self._fresh[received.header.index if received.header.HasField("index") else None].append(received)

    def _led_to(self, index: int) -> Arrays:
        """What was captured since a completion's last token; for its first token, of the prompt."""
        from cutaway.seen import assembled

        own = self._fresh.pop(index, [])
        return assembled([*self._fresh[None], *own] if not self._tokens[index] else own)

    def _finish(self, wire: pb.Finished) -> None:
        self.completions = tuple(replies.completion(each, self._tokens[each.index]) for each in wire.completions)
        self.usage = replies.flat(Usage, wire.usage)
        self.timings = replies.flat(Timings, wire.timings)

    def _ended_early(self) -> CutawayError:
        if self._closed:
            return Cancelled("the stream was closed before its end")
        return ServerError("the stream has no last message (yet)")
