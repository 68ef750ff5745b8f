"""What people see: text that can do no harm to a terminal, a spinner while nothing comes, a line of figures."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from cutaway.errors import CutawayError

if TYPE_CHECKING:
    from cutaway.client import Stream
    from cutaway.results import Timings, Usage

# Control characters but newline and tab: a model may write escape sequences, the terminal must not obey them.
HARMLESS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def harmless(text: str) -> str:
    """The text with control characters replaced."""
    return text.translate(HARMLESS)


def shown(stream: Stream) -> Iterator[str]:
    """The text of a stream piece by piece, after a spinner on the terminal until there is some."""
    texts = (token.text for token in stream if token.text)
    with spinner():
        first = next(texts, "")
    yield first
    yield from texts


def write(stream: Stream) -> None:
    """Write a stream's text to standard output as it comes, and a newline."""
    try:
        for text in shown(stream):
            click.echo(harmless(text) if sys.stdout.isatty() else text, nl=False)
    except CutawayError:
        if stream.text:  # the error has a line of its own
            click.echo()
        raise
    click.echo()


@contextmanager
def spinner() -> Iterator[None]:
    """Turn a spinner on stderr while the block runs, if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status("waiting for the first token"):
        yield


def figures(usage: Usage, timings: Timings) -> str:
    """Tokens, speed and cache in one line."""
    parts = [f"{usage.completion_tokens} tokens"]
    if timings.decode_seconds > 0 and usage.completion_tokens > 1:
        parts.append(f"{(usage.completion_tokens - 1) / timings.decode_seconds:.1f} tokens/s")
    parts.append(f"first token after {1000 * (timings.queue_seconds + timings.prefill_seconds):.0f} ms")
    parts.append(f"{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens cached")
    return ", ".join(parts)
