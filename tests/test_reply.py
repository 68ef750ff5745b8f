"""Events in, messages out: what the engine tells late, early or never must not reach the client."""

from __future__ import annotations

import pytest
from cutaway.v1 import inference_pb2 as v1
from cutaway_server.errors import EngineFailed
from cutaway_server.request import (
    CompletionEnded,
    Event,
    FinishReason,
    Logprobs,
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

    def __init__(self, text: TextModel, max_backlog: int = 2**20, **sampling: object) -> None:
        params = SamplingParams(seed=1, max_tokens=400, **sampling)  # type: ignore[arg-type]
        asked = Asked(Request("r", (40, 41), params, 0.0), skip_special_tokens=True, echo=None)
        self.ended: list[int] = []
        self.reply = Reply(asked, text, v1.Started(), max_backlog, self.ended.append)

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


async def test_text_held_back_for_a_stop_text_comes_with_the_last_token(text: TextModel) -> None:
    told = Told(text, stop=("quiet now",))
    tokens = ids(text, "lay quiet")
    told.hear(Started(0), *sampled(tokens))
    first = (await told.reply.take())[-1].delta
    assert first.text == "lay "
    told.hear(CompletionEnded(0, FinishReason.LENGTH), END)
    tail, finished = await told.everything()
    assert (tail.delta.text, len(tail.delta.tokens)) == ("quiet", 0)  # its token has been read already
    assert finished.finished.completions[0].finish_reason == v1.FINISH_REASON_LENGTH

    unread = Told(text, stop=("quiet now",))
    unread.hear(Started(0), *sampled(tokens), CompletionEnded(0, FinishReason.LENGTH), END)
    delta = (await unread.everything())[1].delta
    assert delta.text == "".join(token.text for token in delta.tokens) == "lay quiet"


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
    messages = await outbox.take()
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
