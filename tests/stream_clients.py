"""A program of many clients: streams that finish, are cancelled, or run out of time, again and again, for a while.

Reads what to do as JSON from its input, says "ready", begins at the next line, and writes what it saw as JSON.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import grpc
from cutaway.v1 import inference_pb2 as v1

METHOD = "/cutaway.v1.Inference/Generate"
FATES = ("finish", "cancel", "cancel", "vanish", "deadline")
ENDLESS = 400  # tokens: more than are made before it is ended


@dataclass(frozen=True)
class Plan:
    """What the program is told."""

    address: str
    key: str
    streams: int
    seconds: float
    seed: int
    answers: list[tuple[list[int], list[int]]]  # prompts, and the tokens that greedy decoding makes of them


class Clients:
    """So many streams at a time; `seen` counts what became of them."""

    def __init__(self, plan: Plan, channel: grpc.aio.Channel) -> None:
        self._plan = plan
        self._call = channel.unary_stream(METHOD, response_deserializer=v1.GenerateResponse.FromString)
        self._metadata = [("authorization", f"Bearer {plan.key}")]
        self._chance = random.Random(plan.seed)
        self._end = time.monotonic() + plan.seconds
        self.seen: Counter[str] = Counter()

    async def run(self) -> None:
        """Keep all streams open until the time is over."""
        await asyncio.gather(*(self._again_and_again() for _ in range(self._plan.streams)))

    async def _again_and_again(self) -> None:
        while time.monotonic() < self._end:
            await self._stream(self._chance.choice(FATES))

    async def _stream(self, fate: str) -> None:
        prompt, answer = self._chance.choice(self._plan.answers)
        tokens = len(answer) if fate == "finish" else ENDLESS
        sampling = v1.SamplingParams(temperature=0, ignore_eos=True, max_tokens=tokens)
        asked = v1.GenerateRequest(token_ids=v1.TokenIds(ids=prompt), sampling=sampling).SerializeToString()
        timeout = self._chance.uniform(0.5, 1.5) if fate == "deadline" else None
        patience = self._chance.randrange(1, 12) if fate == "cancel" else 10**6
        call: Any = self._call(asked, metadata=self._metadata, timeout=timeout)
        if fate == "vanish":
            await asyncio.sleep(self._chance.uniform(0, 0.5))
            call.cancel()
        try:
            code = await self._read(call, prompt, answer, patience)
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
        except grpc.RpcError as error:
            code = error.code()
        self.seen[f"{fate}:{code.name}"] += 1

    async def _read(self, call: Any, prompt: list[int], answer: list[int], patience: int) -> grpc.StatusCode:
        messages, tokens = 0, 0
        async for message in call:
            messages += 1
            kind = message.WhichOneof("event")
            if kind == "started":
                self.seen["started"] += 1
            elif kind == "delta":
                ids = [token.id for token in message.delta.tokens]
                expected = answer[tokens : tokens + len(ids)]  # longer streams go on behind it
                self.seen["wrong"] += ids[: len(expected)] != expected
                tokens += len(ids)
                self.seen["tokens"] += len(ids)
            elif kind == "finished":
                self.seen["finished prompt tokens"] += message.finished.usage.prompt_tokens
                self.seen["finished tokens"] += message.finished.usage.completion_tokens
                self.seen["short"] += tokens != message.finished.usage.completion_tokens
            if messages >= patience:
                call.cancel()
                return grpc.StatusCode.CANCELLED
        return await call.code()


async def main() -> None:
    plan = Plan(**json.loads(sys.stdin.readline()))
    async with grpc.aio.insecure_channel(plan.address) as channel:
        await channel.channel_ready()
        print("ready", flush=True)
        sys.stdin.readline()
        clients = Clients(plan, channel)
        await clients.run()
    print(json.dumps(clients.seen), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
