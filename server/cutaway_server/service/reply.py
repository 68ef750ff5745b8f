"""One request's stream in the making: the engine's events become messages, with text found and stop texts obeyed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cutaway.v1 import inference_pb2 as v1

from cutaway_server.request import (
    CompletionEnded,
    Event,
    FinishReason,
    Logprobs,
    PromptScored,
    Request,
    RequestEnded,
    RequestFailed,
    Sampled,
    Started,
    Timings,
)  # fmt: skip
from cutaway_server.service.outbox import MESSAGE_BYTES, Outbox, token_size
from cutaway_server.service.tokens import wire_token
from cutaway_server.text.stream import CompletionText
from cutaway_server.text.tokenizer import TextModel

REASONS = {
    FinishReason.STOP: v1.FINISH_REASON_STOP,
    FinishReason.LENGTH: v1.FINISH_REASON_LENGTH,
    FinishReason.ABORT: v1.FINISH_REASON_ABORT,
}


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and how its answer is to look. `echo`: the prompt's tokens, to be sent before each completion."""

    request: Request
    skip_special_tokens: bool
    echo: Sequence[v1.Token] | None


@dataclass(slots=True)
class _Completion:
    """One completion on its way out."""

    text: CompletionText
    tokens: int = 0
    begun: bool = False
    ended: v1.Completion | None = None


class Reply:
    """The answer to one request. Used on the event loop only."""

    def __init__(
        self, asked: Asked, model: TextModel, served: v1.Started, max_backlog: int, end_early: Callable[[int], None]
    ) -> None:
        """Prepare an answer.

        Args:
            asked: what was asked.
            model: turns tokens into text.
            served: the facts of the server that the first message tells.
            max_backlog: bytes that may wait for the reader.
            end_early: ends the completion of an index in the engine, because a stop text is found.
        """
        sampling = asked.request.sampling
        self._asked = asked
        self._end_early = end_early
        self._outbox = Outbox(max_backlog)
        self._started = False
        self._cached_tokens = 0
        self._served = served
        self._prompt_text = CompletionText(model, (), asked.skip_special_tokens, 0)
        self._prompt_logprobs: dict[int, Logprobs] = {}  # by position, kept for the echo
        self._completions = [
            _Completion(CompletionText(model, sampling.stop, asked.skip_special_tokens, sampling.min_tokens))
            for _ in range(sampling.n)
        ]
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
        self._prompt_text.push(self._asked.request.prompt[0])  # has no log-probability, but may begin a character

    def _scored(self, event: PromptScored) -> None:
        if self._asked.echo is not None:
            self._prompt_logprobs.update(enumerate(event.logprobs, event.position))
        tokens = [
            wire_token(token, self._prompt_text.push(token).text, 0, logprobs)
            for token, logprobs in zip(event.tokens, event.logprobs, strict=True)
        ]
        position = event.position
        for part in _split(tokens):
            scores = v1.PromptLogprobs(position=position, tokens=part)
            self._outbox.put(v1.GenerateResponse(prompt_logprobs=scores))
            position += len(part)

    def _sampled(self, event: Sampled) -> None:
        completion = self._begun(event.index)
        if completion.ended is not None:
            return  # the engine made it before it heard of the stop text
        completion.tokens += 1
        shown, stop = self._show(completion.text, event.token)
        self._outbox.put_token(event.index, wire_token(event.token, shown, event.step, event.logprobs))
        if stop is not None:
            completion.ended = _stopped(event.index, completion.tokens, stop)
            self._end_early(event.index)

    def _show(self, text: CompletionText, token: int) -> tuple[str, str | None]:
        sampling = self._asked.request.sampling
        ends = token in sampling.stop_token_ids
        if ends or (token in sampling.eos_token_ids and self._asked.skip_special_tokens):
            return "", None  # what ends a completion is not part of its text
        shown = text.push(token)
        return shown.text, shown.stop

    def _ended(self, event: CompletionEnded) -> None:
        completion = self._begun(event.index)
        if completion.ended is not None:
            return
        if tail := completion.text.finish():
            self._outbox.put_tail(event.index, tail)
        if completion.text.stop is not None:  # it took the last characters to complete it
            completion.ended = _stopped(event.index, completion.tokens, completion.text.stop)
            return
        completion.ended = v1.Completion(
            index=event.index, finish_reason=REASONS[event.reason], completion_tokens=completion.tokens
        )
        if event.stop_token is not None:
            completion.ended.stop_token_id = event.stop_token

    def _begun(self, index: int) -> _Completion:
        """The completion, its echo sent."""
        completion = self._completions[index]
        if not self._started:
            self._start(0)  # aborted in the queue: the first message is `started` all the same
        if not completion.begun:
            completion.begun = True
            for part in _split(self._echo()):
                text = "".join(token.text for token in part)
                self._outbox.put(v1.GenerateResponse(delta=v1.Delta(index=index, text=text, tokens=part)))
        return completion

    def _echo(self) -> Iterator[v1.Token]:
        for position, token in enumerate(self._asked.echo or ()):
            logprobs = self._prompt_logprobs.get(position)
            yield token if logprobs is None else wire_token(token.id, token.text, 0, logprobs)

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


def _split(tokens: Iterator[v1.Token] | Sequence[v1.Token]) -> Iterator[list[v1.Token]]:
    """Runs of tokens that each fit a message."""
    part: list[v1.Token] = []
    size = 0
    for token in tokens:
        size += token_size(token)
        if part and size > MESSAGE_BYTES:
            yield part
            part, size = [], token_size(token)
        part.append(token)
    if part:
        yield part
