"""Rates from the times at which tokens came. Needs nothing installed: a peer's worker runs in a Python of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

Come = tuple[float, int, int]  # when, of which stream, how many tokens


def rates(start: float, comes: Iterable[Come], prompts: list[int], output: int) -> dict[str, float]:
    """Rates of streams begun together: `prompts` are their lengths, `output` the tokens that each generates.

    Prompts count until every stream has its first token. Decoding counts from there until the first stream ends, so
    that all streams run all the time; it is missing where `output` leaves no such time.
    """
    times: list[list[float]] = [[] for _ in prompts]
    for at, stream, tokens in sorted(comes):
        times[stream] += [at] * tokens
    if any(len(stream) != output for stream in times):
        raise ValueError(f"streams of {sorted({len(stream) for stream in times})} tokens came, not of {output}")
    begun, first_end = max(stream[0] for stream in times), min(stream[-1] for stream in times)
    found = {"prompt_tokens_per_second": sum(prompts) / (begun - start)}
    if first_end > begun:
        decoded = sum(begun < at <= first_end for stream in times for at in stream)
        found["tokens_per_second"] = decoded / (first_end - begun)
    return found


def answer_lines(facts: dict[str, Any], answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Say that this worker is ready; then answer each line of JSON with one."""
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:  # told to whoever asked
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)
