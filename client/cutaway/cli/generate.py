"""`cutaway generate`: one prompt, its completions."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from cutaway.cli.connection import connect, connection_options
from cutaway.cli.options import given, output_options, sampling_options, timeout_option, token_ids
from cutaway.cli.screen import figures, harmless, spinner, write
from cutaway.cli.side_by_side import watch
from cutaway.options import Message

if TYPE_CHECKING:
    from cutaway.client import Stream
    from cutaway.results import Answer


@click.command()
@click.argument("prompt", required=False)
@click.option("--token-ids", "ids", type=token_ids, metavar="IDS", help="The prompt as token ids.")
@click.option("--chat", "as_chat", is_flag=True, help="The prompt is a user's message for the chat template.")
@click.option("--system", metavar="TEXT", help="The conversation's system message; implies --chat.")
@sampling_options
@output_options
@timeout_option
@connection_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--stream", is_flag=True, help="With --json: a line per token, then a line for the end.")
def generate(
    prompt: str | None,
    ids: tuple[int, ...] | None,
    as_chat: bool,
    system: str | None,
    timeout: float | None,
    as_json: bool,
    stream: bool,
    **options: object,
) -> None:
    """Continue PROMPT, or standard input if it is "-" or left out (without its last newline).

    Options that are not given follow the model's generation_config, then the documented defaults. Ctrl-C cancels the
    request on the server.
    """
    wanted = given(options)
    for name in () if as_json else ("logprobs", "prompt_logprobs"):
        if name in wanted:
            raise click.UsageError(f"--{name.replace('_', '-')} needs --json: beside a text there is no place for them")
    if stream and not as_json:
        raise click.UsageError("--stream needs --json: a text is always written as it comes")
    if ids is not None:
        if prompt is not None or as_chat or system is not None:
            raise click.UsageError("--token-ids excludes PROMPT, --chat and --system")
        wanted["token_ids"] = ids
    else:
        prompt = read(prompt)
        if as_chat or system is not None:
            wanted["messages"], prompt = conversation(system, prompt), None
    with connect(timeout) as client:
        if as_json and stream:
            print_events(client.generate(prompt, **wanted))
        elif as_json:
            with spinner():
                answer = client.complete(prompt, **wanted)
            print_json(summary(answer))
        elif wanted.get("n", 1) == 1:
            print_text(client.generate(prompt, **wanted))
        else:
            print_all(client.generate(prompt, **wanted))


def read(text: str | None) -> str:
    """The text given, or standard input without its last newline."""
    if text is not None and text != "-":
        return text
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise click.ClickException(f"standard input is not UTF-8: {error}") from error


def conversation(system: str | None, prompt: str) -> list[Message]:
    """The turns of a conversation that begins."""
    turns: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*turns, {"role": "user", "content": prompt}]


def print_text(stream: Stream) -> None:
    """Write the text as it comes; on a terminal, a line of figures below."""
    with stream:
        write(stream)
    if sys.stderr.isatty() and stream.usage and stream.timings:
        click.secho(figures(stream.usage, stream.timings), dim=True, err=True)


def print_all(stream: Stream) -> None:
    """Write several completions, one after the other; meanwhile, on a terminal, how each comes along."""
    with stream:
        watch(stream)
    answer = stream.answer()
    for each in answer.completions:
        click.secho(f"-- {each.index} ({each.finish_reason})", fg="cyan")
        click.echo(harmless(each.text) if sys.stdout.isatty() else each.text)
    if sys.stderr.isatty():
        click.secho(figures(answer.usage, answer.timings), dim=True, err=True)


def print_events(stream: Stream) -> None:
    """Write a JSON line per token, then one with everything that is known at the end."""
    with stream:
        for token in stream:
            print_json({"event": "token", **asdict(token)})
    print_json({"event": "finished", **summary(stream.answer())})


def summary(answer: Answer) -> dict[str, object]:
    """An answer for scripts: completion 0 on top, and all there is."""
    short = {"text": answer.text, "token_ids": answer.token_ids, "finish_reason": answer.finish_reason}
    return {"request_id": answer.request_id, **short, **asdict(answer)}


def print_json(value: Mapping[str, object]) -> None:
    """Write one line of JSON."""
    click.echo(json.dumps(value, ensure_ascii=False))
