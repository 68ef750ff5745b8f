"""Events find their replies, and the engine hears once of what nobody will read."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from cutaway.v1 import inference_pb2 as v1
from cutaway_server.errors import EngineFailed
from cutaway_server.request import (
    CompletionEnded,
    Event,
    FinishReason,
    Request,
    RequestEnded,
    RequestFailed,
    Sampled,
    SamplingParams,
    Started,
    Timings,
)
from cutaway_server.service.desk import Desk
from cutaway_server.service.reply import Asked, Reply
from cutaway_server.text.stream import CompletionText, StreamDecoder
from cutaway_server.text.tokenizer import TextModel
from tiny import save_tokenizer


class Noting:
    """A backend that computes nothing and notes what it is told."""

    def __init__(self) -> None:
        self.aborted: list[tuple[str, int | None]] = []

    def submit(self, request: Request) -> None:
        pass

    def abort(self, request_id: str, index: int | None = None) -> bool:
        self.aborted.append((request_id, index))
        return True


async def aborts_after(path: Path, events: list[Event]) -> list[tuple[str, int | None]]:
    """What the engine is told when these events come for a request whose reader reads nothing."""
    save_tokenizer(path)
    text = CompletionText(StreamDecoder(TextModel.from_directory(path)), (), 0)
    request = Request("r", (40, 41), SamplingParams(seed=1, max_tokens=400), 0.0)
    desk, backend = Desk(asyncio.get_running_loop()), Noting()
    desk.connect(backend)
    with desk.stream(request, lambda end: Reply(Asked(request, True, text), v1.Started(), 2**10, end)):
        for event in events:
            desk.report([("r", event)])
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        return list(backend.aborted)


async def test_a_reply_that_fails_is_aborted_once(tmp_path: Path) -> None:
    events = [Started(0), *(Sampled(0, 50, step, None) for step in range(100))]
    assert await aborts_after(tmp_path, events) == [("r", None)]


@pytest.mark.parametrize(
    "ends",
    [
        [RequestFailed(EngineFailed("broken"))],
        [CompletionEnded(0, FinishReason.LENGTH), RequestEnded(Timings(0.0, 0.0, 0.0, 0))],
    ],
)
async def test_what_the_engine_has_ended_is_not_aborted(tmp_path: Path, ends: list[Event]) -> None:
    assert await aborts_after(tmp_path, [Started(0), Sampled(0, 50, 1, None), *ends]) == []
