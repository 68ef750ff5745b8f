"""The table of goals: what each row measures, of whom, and what it must reach. See docs/performance.md."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from contestants import Contestant, Served
from doors import GrpcDoor
from replay import Summary, replay
from served import long_prompt, shared_prefix
from workload import Ask, drawn

PROMPT, OUTPUT = 128, 128
RATE, PROMPTS = "tokens_per_second", "prompt_tokens_per_second"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much one measurement asks for."""

    asks: tuple[Ask, ...]  # the served workload; also where prompts are cut from
    output: int = OUTPUT
    requests: int = 8  # for a time to the first token
    context: int = 1000
    long_prompt: int = 1500


Measure = Callable[[Contestant, Sizes, random.Random], dict[str, float]]


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound on a figure: ours over the peer's, or ours alone where the row has no peer to beat."""

    figure: str
    bound: float
    at_least: bool = True

    def met(self, value: float) -> bool:
        """Whether the value keeps the bound."""
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g}"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `ratio` tells whether goals are for ours over the peer's or for ours alone."""

    name: str
    measure: Measure
    ours: str
    peer: str | None
    goals: tuple[Goal, ...]
    ratio: bool = True
    streams: int = 0  # of a decode row, whose share of the memory limit is told


def decode(streams: int) -> Measure:
    """Tokens a second of streams that all run."""

    def measure(who: Contestant, sizes: Sizes, source: random.Random) -> dict[str, float]:
        assert not isinstance(who, Served)
        return {RATE: who.streams(drawn(sizes.asks, streams, PROMPT, sizes.output, source))[RATE]}

    return measure


def prefill(who: Contestant, sizes: Sizes, source: random.Random) -> dict[str, float]:
    """Prompt tokens a second: eight prompts of 512 tokens."""
    assert not isinstance(who, Served)
    return {PROMPTS: who.streams(drawn(sizes.asks, 8, 512, 1, source))[PROMPTS]}


def context(who: Contestant, sizes: Sizes, source: random.Random) -> dict[str, float]:
    """How much slower one stream decodes after a long prompt than after 100 tokens."""
    assert not isinstance(who, Served)
    near, far = (
        who.streams(drawn(sizes.asks, 1, prompt, sizes.output // 2, source))[RATE] for prompt in (100, sizes.context)
    )
    return {"at_100": near, f"at_{sizes.context}": far, "loss": 1 - far / near}


def serve(concurrency: int) -> Measure:
    """The workload, so many requests at once."""

    def measure(who: Contestant, sizes: Sizes, source: random.Random) -> dict[str, float]:
        assert isinstance(who, Served)
        replay(who.door, drawn(sizes.asks, 8, 16, 4, source), 8)  # what was paused finds its caches cold
        summary = Summary.of(replay(who.door, sizes.asks, concurrency))
        return {
            "output_tokens_per_second": summary.output_tokens_per_second,
            "first_token_p50_ms": summary.first_token_ms[0], "first_token_p95_ms": summary.first_token_ms[1],
            "between_p50_ms": summary.between_tokens_ms[0], "between_p95_ms": summary.between_tokens_ms[1],
            "errors": float(sum(summary.errors.values())), "client_share": summary.client_share,
        }  # fmt: skip

    return measure


def first_token(who: Contestant, sizes: Sizes, source: random.Random) -> dict[str, float]:
    """Milliseconds to the first token of requests that come one after the other."""
    assert isinstance(who, Served)
    replay(who.door, drawn(sizes.asks, 2, PROMPT, 8, source), 1)
    summary = Summary.of(replay(who.door, drawn(sizes.asks, sizes.requests, PROMPT, 16, source), 1))
    return {"first_token_p50_ms": summary.first_token_ms[0], "errors": float(sum(summary.errors.values()))}


def second_of_a_prefix(who: Contestant, sizes: Sizes, source: random.Random) -> dict[str, float]:
    """The time to the first token of the second request with a long prefix, over the first's."""
    assert isinstance(who, Served)
    assert isinstance(who.door, GrpcDoor)
    return shared_prefix(GrpcDoor(who.door.address, prefix_caching=True), sizes.asks, sizes.context, source)


def beside_a_long_prompt(who: Contestant, sizes: Sizes, source: random.Random) -> dict[str, float]:
    """What a long prompt does to eight streams, and they to it."""
    assert isinstance(who, Served)
    return long_prompt(who.door, sizes.asks, sizes.long_prompt, source)


def served_goals(times: float) -> tuple[Goal, ...]:
    """More tokens, and both latencies lower."""
    rate, *latencies = "output_tokens_per_second", "first_token_p50_ms", "between_p95_ms"
    return (Goal(rate, times), *(Goal(name, 1.0, at_least=False) for name in latencies))


def rows() -> Sequence[Row]:
    """All rows, in an order in which few contestants run at once."""
    alone = [("bf16", "bf16", 1.0), ("int8", "q8_0", 1.15), ("q4_0", "q4_0", 1.15), ("q4_1", "q4_1", 1.15)]
    batches = [(8, "bf16", 1.5), (8, "int8", 2.5), (32, "bf16", 1.4), (32, "int8", 2.0)]
    served = [(16, "bf16", 1.3), (64, "bf16", 1.3), (16, "int8", 1.7), (64, "int8", 1.7)]
    found = [
        Row(f"decode-1-{w}", decode(1), f"ours {w}", f"llama {p}", (Goal(RATE, x),), streams=1) for w, p, x in alone
    ]
    found.append(Row("context", context, "ours bf16", "llama bf16", (Goal("loss", 0.25, at_least=False),), ratio=False))
    for n, weights, times in batches:
        goals = (Goal(RATE, times),)
        found.append(Row(f"decode-{n}-{weights}", decode(n), f"ours {weights}", "vllm bf16", goals, streams=n))
    for weights, times in (("bf16", 1.0), ("int8", 1.7)):
        goals = (Goal(PROMPTS, times),)
        found.append(Row(f"prefill-{weights}", prefill, f"ours {weights}", "vllm bf16", goals))
    for n, weights, times in served:
        name, ours = f"serve-{n}-{weights}", f"our-server {weights}"
        found.append(Row(name, serve(n), ours, "vllm-server bf16", served_goals(times)))
    for weights, times in (("bf16", 0.9), ("int8", 0.6)):
        goals = (Goal("first_token_p50_ms", times, at_least=False),)
        found.append(Row(f"first-token-{weights}", first_token, f"our-server {weights}", "vllm-server bf16", goals))
    reached = (Goal("of_first", 0.15, at_least=False),)
    found.append(Row("prefix", second_of_a_prefix, "our-server bf16", None, reached, ratio=False))
    slowed = (("between_p95_of_undisturbed", 2.5), ("first_token_of_undisturbed", 3.0))
    kept = tuple(Goal(name, times, at_least=False) for name, times in slowed)
    found.append(Row("long-prompt", beside_a_long_prompt, "our-server bf16", None, kept, ratio=False))
    return found
