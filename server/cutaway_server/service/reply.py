"""One request's stream in the making: the engine's events become messages, with text found and stop texts obeyed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from cutaway.v1 import inference_pb2 as v1

from cutaway_server.captures import Captured
from cutaway_server.request import (
    CompletionEnded,
    Event,
    FinishReason,
    PromptScored,
    Request,
    RequestEnded,
    RequestFailed,
    Sampled,
    Started,
    Timings,
)  # fmt: skip
from cutaway_server.service.outbox import Outbox, Shared, parts, token_size
from cutaway_server.service.tensors import tensor_header
from cutaway_server.service.tokens import wire_token
from cutaway_server.text.stream import CompletionText

REASONS = {
    FinishReason.STOP: v1.FINISH_REASON_STOP,
    FinishReason.LENGTH: v1.FINISH_REASON_LENGTH,
    FinishReason.ABORT: v1.FINISH_REASON_ABORT,
}


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and how its answer is to look.

    `text` has taken the prompt: each completion goes on from a fork of it. `prompt_texts` are those of the prompt's
    tokens, if they are to be sent. `echo`: the prompt's tokens, to be sent before each completion.
    """

    request: Request
    skip_special_tokens: bool
    text: CompletionText
    prompt_texts: Sequence[str] = ()
    echo: Sequence[v1.Token] | None = None
    capture_bytes: int = 0  # of its captures, at most


@dataclass(slots=True)
class _Completion:
    """One completion on its way out."""

    text: CompletionText
    tokens: int = 0
    begun: bool = False
    last: v1.Token | None = None  # not sent yet: what ends the completion may set text free that it holds back
    ended: v1.Completion | None = None
    unsent: list[Captured] = field(default_factory=list)  # they come after `last`


class Reply:
    """The answer to one request. Used on the event loop only."""

    def __init__(self, asked: Asked, served: v1.Started, max_backlog: int, end_early: Callable[[int], None]) -> None:
        """Prepare an answer.

        Args:
            asked: what was asked.
            served: the facts of the server that the first message tells.
            max_backlog: bytes that may wait for the reader.
            end_early: ends the completion of an index in the engine, because a stop text is found.
        """
        self._asked = asked
        self._end_early = end_early
        self._outbox = Outbox(max_backlog + asked.capture_bytes)
        self._tensors = 0
        self._started = False
        self._cached_tokens = 0
        self._served = served
        self._echo = list(asked.echo or ())
        self._completions = [_Completion(asked.text.fork()) for _ in range(asked.request.sampling.n)]
        self.failed = False

    async def take(self) -> Sequence[v1.GenerateResponse]:
        """The messages to send next; empty at the end.

        Raises:
            Exception: the request failed.
        """
        return await self._outbox.take()

    @property
    def state(self) -> str:
        """How far it has come, for the log."""
        if self.failed:
            return "failed"
        return "finished" if self._outbox.closed else "given up by its client"

    def fail(self, error: Exception) -> None:
        """End with an error, after what waits."""
        self.failed = True
        for index in range(len(self._completions)):
            self._send_last(index)
        self._outbox.close(error)

    def leave(self) -> None:
        """Forget everything: the reader has gone."""
        self._outbox.discard()

    def add(self, event: Event) -> None:
        """Take in what the engine tells."""
        if self._outbox.closed:
            return
        match event:
            case Started():
                self._start(event.cached_tokens)
            case PromptScored():
                self._scored(event)
            case Captured():
                self._captured(event)
            case Sampled():
                self._sampled(event)
            case CompletionEnded():
                self._ended(event)
            case RequestEnded():
                self._finish(event.timings)
            case RequestFailed():
                self.fail(event.error)
        self.failed = self.failed or (self._outbox.closed and not isinstance(event, RequestEnded))

    def _start(self, cached_tokens: int) -> None:
        self._started, self._cached_tokens = True, cached_tokens
        started = v1.Started()
        started.CopyFrom(self._served)
        started.request_id = self._asked.request.request_id
        started.prompt_tokens = len(self._asked.request.prompt)
        started.cached_tokens = cached_tokens
        started.seed = self._asked.request.sampling.seed
        self._outbox.put(v1.GenerateResponse(started=started))

    def _scored(self, event: PromptScored) -> None:
        places = slice(event.position, event.position + len(event.tokens))
        tokens = [
            wire_token(token, text, 0, logprobs)
            for token, text, logprobs in zip(
                event.tokens, self._asked.prompt_texts[places], event.logprobs, strict=True
            )
        ]
        if self._asked.echo is not None:
            self._echo[places] = tokens
        position = event.position
        for part in parts(tokens):
            scores = v1.PromptLogprobs(position=position, tokens=part)
            self._outbox.put(v1.GenerateResponse(prompt_logprobs=scores))
            position += len(part)

    def _captured(self, event: Captured) -> None:
        if event.index is None:
            self._send_tensors(event)
            return
        completion = self._completions[event.index]
        if completion.ended is not None:
            return  # likewise, as of a token
        if completion.last is not None:
            completion.unsent.append(event)
        else:
            self._begin(event.index)
            self._send_tensors(event)

    def _send_tensors(self, event: Captured) -> None:
        for part in event.parts:
            header = tensor_header(event, part, self._tensors)
            self._outbox.put_tensor(header, part.data)
            self._tensors += 1

    def _sampled(self, event: Sampled) -> None:
        completion = self._completions[event.index]
        if completion.ended is not None:
            return  # the engine made it before it heard of the stop text
        self._begin(event.index)
        self._send_last(event.index)
        completion.tokens += 1
        shown, stop = self._show(completion.text, event.token)
        completion.last = wire_token(event.token, shown, event.step, event.logprobs)
        if not completion.text.pending:
            self._send_last(event.index)
        if stop is not None:
            completion.ended = _stopped(event.index, completion.tokens, stop)
            self._end_early(event.index)

    def _send_last(self, index: int) -> None:
        completion = self._completions[index]
        last, completion.last = completion.last, None
        if last is not None:
            self._outbox.put_token(index, last)
        unsent, completion.unsent = completion.unsent, []
        for event in unsent:
            self._send_tensors(event)

    def _show(self, text: CompletionText, token: int) -> tuple[str, str | None]:
        sampling = self._asked.request.sampling
        ends = token in sampling.stop_token_ids
        if ends or (token in sampling.eos_token_ids and self._asked.skip_special_tokens):
            return "", None  # what ends a completion is not part of its text
        shown = text.push(token)
        return shown.text, shown.stop

    def _ended(self, event: CompletionEnded) -> None:
        completion = self._completions[event.index]
        if completion.ended is not None:
            return
        tail = completion.text.finish()
        if completion.last is not None:
            completion.last.text += tail
            self._send_last(event.index)
        self._begin(event.index, tail)
        if completion.text.stop is not None:  # it took the last characters to complete it
            completion.ended = _stopped(event.index, completion.tokens, completion.text.stop)
            return
        completion.ended = v1.Completion(
            index=event.index, finish_reason=REASONS[event.reason], completion_tokens=completion.tokens
        )
        if event.stop_token is not None:
            completion.ended.stop_token_id = event.stop_token

    def _begin(self, index: int, tail: str = "") -> None:
        """Send, once, what comes before a completion's tokens; `tail` is text for the last token of its echo."""
        completion = self._completions[index]
        if not self._started:
            self._start(0)  # aborted in the queue: the first message is `started` all the same
        if completion.begun:
            return
        completion.begun = True
        for number, shared in enumerate(self._echoes, 1):
            self._outbox.put_shared(index, shared, tail if number == len(self._echoes) else "")

    @cached_property
    def _echoes(self) -> list[Shared]:
        """The echo in messages, with the prompt's log-probabilities: complete when the first completion begins."""
        return [Shared(v1.Delta(tokens=part), sum(map(token_size, part))) for part in parts(self._echo)]

    def _finish(self, timings: Timings) -> None:
        completions = [completion.ended for completion in self._completions]
        assert None not in completions, "the engine ends every completion before the request"
        usage = v1.Usage(
            prompt_tokens=len(self._asked.request.prompt),
            cached_tokens=self._cached_tokens,
            completion_tokens=sum(completion.tokens for completion in self._completions),
        )
        self._outbox.put(
            v1.GenerateResponse(
                finished=v1.Finished(
                    completions=[c for c in completions if c is not None],
                    usage=usage,
                    timings=v1.Timings(
                        queue_seconds=timings.queue_seconds,
                        prefill_seconds=timings.prefill_seconds,
                        decode_seconds=timings.decode_seconds,
                        preemptions=timings.preemptions,
                    ),
                )
            )
        )
        self._outbox.close()


def _stopped(index: int, tokens: int, stop: str) -> v1.Completion:
    reason = v1.FINISH_REASON_STOP
    return v1.Completion(index=index, finish_reason=reason, completion_tokens=tokens, stop=stop)
