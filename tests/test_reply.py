"""Events in, messages out: what the engine tells late, early or never must not reach the client."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import pytest
from cutaway.v1 import inference_pb2 as v1
from cutaway_server.errors import EngineFailed
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
    SamplingParams,
    Started,
    Timings,
)
from cutaway_server.service.outbox import MESSAGE_BYTES, Outbox
from cutaway_server.service.reply import Asked, Reply
from cutaway_server.service.status import Backlog
from cutaway_server.service.tokens import wire_token
from cutaway_server.text.stream import CompletionText, StreamDecoder, stop_texts
from cutaway_server.text.tokenizer import TextModel
from tiny import save_tokenizer

END = RequestEnded(Timings(0.0, 0.0, 0.0, 0))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return TextModel.from_directory(path)


class Told:
    """A reply, what it says, and which completions it ended early."""

    def __init__(
        self,
        text: TextModel,
        max_backlog: int = 2**20,
        prompt: tuple[int, ...] = (40, 41),
        echo: bool = False,
        **sampling: object,
    ) -> None:
        params = SamplingParams(seed=1, max_tokens=400, **sampling)  # type: ignore[arg-type]
        decoder = StreamDecoder(text)
        texts = tuple(map(decoder.push, prompt))
        if not echo:
            decoder.disown()
        completion = CompletionText(decoder, stop_texts(params.stop), params.min_tokens)
        echoed = tuple(wire_token(*token, 0, None) for token in zip(prompt, texts, strict=True)) if echo else None
        self.asked = Asked(Request("r", prompt, params, 0.0), True, completion, texts, echoed)
        self.ended: list[int] = []
        self.reply = Reply(self.asked, v1.Started(), max_backlog, self.ended.append)

    def hear(self, *events: Event) -> None:
        for event in events:
            self.reply.add(event)

    async def everything(self) -> list[v1.GenerateResponse]:
        messages: list[v1.GenerateResponse] = []
        while taken := await self.reply.take():
            messages += taken
        return messages


def ids(text: TextModel, words: str) -> list[int]:
    return list(text.encode(words, add_special_tokens=False).ids)


def sampled(tokens: list[int], index: int = 0) -> list[Event]:
    return [Sampled(index, token, step, None) for step, token in enumerate(tokens, 1)]


async def test_what_the_engine_made_before_it_heard_of_a_stop_text_is_not_told(text: TextModel) -> None:
    told = Told(text, stop=("quiet",))
    before, after = ids(text, "The harbour lay quiet"), ids(text, " in the morning")
    told.hear(Started(0), *sampled(before + after), CompletionEnded(0, FinishReason.ABORT), END)
    messages = await told.everything()
    finished = messages[-1].finished
    assert told.ended == [0]
    assert messages[1].delta.text == "The harbour lay "
    assert [token.id for token in messages[1].delta.tokens] == before
    assert (finished.completions[0].finish_reason, finished.completions[0].stop) == (v1.FINISH_REASON_STOP, "quiet")
    assert finished.usage.completion_tokens == len(before)


def texts_of(messages: Sequence[v1.GenerateResponse], index: int = 0) -> list[tuple[int, str]]:
    return [(t.id, t.text) for m in messages if m.delta.index == index for t in m.delta.tokens]


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.ABORT])
async def test_text_held_back_for_a_stop_text_comes_with_the_last_token(text: TextModel, reason: FinishReason) -> None:
    told = Told(text, stop=("quiet now",))
    tokens = ids(text, "lay quiet")
    told.hear(Started(0), *sampled(tokens))
    first = await told.reply.take()
    assert first[-1].delta.text == "lay "
    assert [token for token, _ in texts_of(first)] == tokens[:-1], "the last token waits for the text it sets free"
    told.hear(CompletionEnded(0, reason), END)
    last, finished = await told.everything()
    assert texts_of([last]) == [(tokens[-1], "quiet")]
    assert last.delta.text == "quiet"
    assert finished.finished.usage.completion_tokens == len(tokens)


async def test_a_token_that_waited_comes_before_the_error_that_ends_its_request(text: TextModel) -> None:
    told = Told(text, stop=("quiet now",))
    tokens = ids(text, "lay quiet")
    told.hear(Started(0), *sampled(tokens))
    told.reply.fail(EngineFailed("broken"))
    messages = await told.reply.take()
    assert [token for token, _ in texts_of(messages)] == tokens
    with pytest.raises(EngineFailed, match="broken"):
        await told.reply.take()


def byte_token(text: TextModel, byte: int) -> int:
    return next(token for token in range(512) if text.token_bytes(token) == bytes([byte]))


async def test_a_character_between_an_echo_and_its_completions_is_whole(text: TextModel) -> None:
    x, lead, acute, grave = (byte_token(text, byte) for byte in (0x78, 0xC3, 0xA9, 0xA8))
    told = Told(text, prompt=(x, lead), echo=True, n=3)
    told.hear(Started(0), Sampled(0, acute, 1, None), Sampled(1, grave, 1, None), Sampled(2, x, 1, None))
    told.hear(*(CompletionEnded(index, FinishReason.LENGTH) for index in range(3)), END)
    messages = await told.everything()
    for index, (token, shown) in enumerate([(acute, "é"), (grave, "è"), (x, "\ufffdx")]):
        assert texts_of(messages, index) == [(x, "x"), (lead, ""), (token, shown)]


async def test_half_a_character_at_the_end_of_an_echo_is_shown_if_nothing_follows(text: TextModel) -> None:
    x, lead = byte_token(text, 0x78), byte_token(text, 0xC3)
    told = Told(text, prompt=(x, lead), echo=True, n=2)
    told.hear(Started(0), *(CompletionEnded(index, FinishReason.LENGTH) for index in range(2)), END)
    messages = await told.everything()
    for index in range(2):
        assert texts_of(messages, index) == [(x, "x"), (lead, "\ufffd")]
    assert [m.delta.text for m in messages[1:-1]] == ["x\ufffd"] * 2


async def test_an_echo_has_the_log_probabilities_of_the_prompt(text: TextModel) -> None:
    told = Told(text, prompt=(40, 41, 42), echo=True, n=2, prompt_logprobs=1)
    scores = [PromptScored(at, (40 + at,), (Logprobs(-at, ((7, -0.5),)),)) for at in (1, 2)]
    told.hear(Started(0), *scores, *sampled([50]), *sampled([51], 1))
    told.hear(*(CompletionEnded(index, FinishReason.LENGTH) for index in range(2)), END)
    messages = await told.everything()
    for index in range(2):
        echo = next(m.delta for m in messages if m.WhichOneof("event") == "delta" and m.delta.index == index)
        assert [t.id for t in echo.tokens] == [40, 41, 42]
        assert [t.logprob if t.HasField("logprob") else None for t in echo.tokens] == [None, -1.0, -2.0]
        assert [len(t.top_logprobs) for t in echo.tokens] == [0, 1, 1]


async def test_long_echoes_and_stop_texts_of_many_completions_hold_nobody_up(text: TextModel) -> None:
    prompt = tuple(range(4, 254))
    top = tuple((token, -1.0) for token in range(50))
    stops = tuple(chr(0x4E00 + i) * 1000 for i in range(64))
    made = perf_counter()
    told = Told(text, 2**30, prompt, echo=True, n=64, stop=stops, prompt_logprobs=50)
    compiled = perf_counter() - made
    made = perf_counter()
    Reply(told.asked, v1.Started(), 2**30, told.ended.append)
    assert perf_counter() - made < max(0.02, compiled / 3)
    told.hear(Started(0), PromptScored(1, prompt[1:], (Logprobs(-1.0, top),) * 249))
    await told.reply.take()
    begun = perf_counter()
    told.hear(*(Sampled(index, 50, 1, None) for index in range(64)))
    assert perf_counter() - begun < 0.1
    told.hear(*(CompletionEnded(index, FinishReason.LENGTH) for index in range(64)), END)
    indices = []
    while messages := await told.reply.take():
        assert sum(message.ByteSize() for message in messages) < 2 * MESSAGE_BYTES, "made when it is sent, not before"
        indices += [message.delta.index for message in messages if len(message.delta.tokens) == 250]
    assert indices == list(range(64))


async def test_a_stop_text_that_only_the_end_completes_is_a_stop_all_the_same(text: TextModel) -> None:
    told = Told(text, stop=("�",))
    half = next(token for token in range(512) if text.token_bytes(token) == "é".encode()[:1])
    told.hear(Started(0), *sampled([half]), CompletionEnded(0, FinishReason.LENGTH), END)
    messages = await told.everything()
    assert messages[-1].finished.completions[0].stop == "�"
    assert "".join(message.delta.text for message in messages) == ""


async def test_a_request_that_was_aborted_in_the_queue_starts_and_finishes(text: TextModel) -> None:
    told = Told(text, n=2)
    told.hear(*(CompletionEnded(index, FinishReason.ABORT) for index in range(2)), END)
    started, finished = await told.everything()
    assert (started.started.request_id, started.started.prompt_tokens) == ("r", 2)
    assert [c.finish_reason for c in finished.finished.completions] == [v1.FINISH_REASON_ABORT] * 2


async def test_an_error_comes_after_what_was_made_before_it(text: TextModel) -> None:
    told = Told(text)
    told.hear(Started(0), *sampled([50, 51]), RequestFailed(EngineFailed("broken")))
    assert [m.WhichOneof("event") for m in await told.reply.take()] == ["started", "delta"]
    with pytest.raises(EngineFailed, match="broken"):
        await told.reply.take()


async def test_what_is_not_read_is_merged_by_completion_below_a_megabyte() -> None:
    outbox = Outbox(2**30)
    top = tuple((token, -1.0) for token in range(128))
    for step in range(1000):
        outbox.put_token(step % 2, wire_token(7, "x", step, Logprobs(-1.0, top)))
    outbox.close()
    messages: list[v1.GenerateResponse] = []
    while taken := await outbox.take():
        messages += taken
    assert len(messages) < 20
    assert max(message.ByteSize() for message in messages) <= MESSAGE_BYTES
    steps = [token.step for message in messages if message.delta.index == 1 for token in message.delta.tokens]
    assert steps == list(range(1, 1000, 2))
    assert await outbox.take() == []


async def test_over_the_backlog_nothing_is_kept_and_the_reply_has_failed(text: TextModel) -> None:
    told = Told(text, max_backlog=2**10)
    told.hear(Started(0), *sampled([50] * 100))
    assert told.reply.failed
    with pytest.raises(Backlog, match="1024 bytes"):
        await told.reply.take()
