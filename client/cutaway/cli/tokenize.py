"""`cutaway tokenize`: the tokens of a text, and how byte-pair encoding finds them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from cutaway.cli.connection import connect, connection_options
from cutaway.cli.generate import conversation, print_json, read
from cutaway.cli.options import flag, timeout_option
from cutaway.cli.screen import harmless

if TYPE_CHECKING:
    from cutaway.results import Tokenized, WordMerges

COLOURS = ("blue", "magenta", "green", "red", "cyan")


@click.command()
@click.argument("text", required=False)
@click.option("--chat", "as_chat", is_flag=True, help="TEXT is a user's message for the chat template.")
@click.option("--merges", is_flag=True, help="Draw the merge steps of each word.")
@flag("parse-special-tokens", "Read special tokens in TEXT as tokens.")
@flag("add-special-tokens", "Add the tokens the model expects around TEXT.")
@timeout_option
@connection_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def tokenize(
    text: str | None,
    as_chat: bool,
    merges: bool,
    parse_special_tokens: bool | None,
    add_special_tokens: bool | None,
    timeout: float | None,
    as_json: bool,
) -> None:
    """Show the tokens of TEXT, or of standard input if it is "-" or left out.

    A line per token: id, piece, and where it starts and ends in the bytes of the text.
    """
    said = read(text)
    with connect(timeout) as client:
        tokens = client.tokenize(
            None if as_chat else said,
            messages=conversation(None, said) if as_chat else None,
            parse_special_tokens=parse_special_tokens,
            add_special_tokens=add_special_tokens,
            merges=merges,
        )
    if as_json:
        print_json(asdict(tokens))
        return
    draw(tokens)


def draw(tokens: Tokenized) -> None:
    """Print the pieces in colours (on a terminal), a line per token, and the merges if there are any."""
    if sys.stdout.isatty():
        click.echo("".join(coloured(piece, i) for i, piece in enumerate(tokens.pieces)))
    for i, (token, piece, (start, end)) in enumerate(zip(tokens.ids, tokens.pieces, tokens.offsets, strict=True)):
        click.echo(f"{token}\t{coloured(piece, i)}\t{start}\t{end}")
    for word in tokens.merges:
        click.echo()
        for line in merge_lines(word):
            click.echo(line)


def coloured(piece: str, i: int) -> str:
    """A piece in the colour of its place."""
    return click.style(harmless(piece), fg="black", bg=COLOURS[i % len(COLOURS)])


def merge_lines(word: WordMerges) -> Iterator[str]:
    """The word's pieces before the first merge and after each, with what was merged and its rank."""
    pieces = [harmless(symbol) for symbol in word.symbols]
    width = len("·".join(pieces)) + 3
    yield "·".join(pieces)
    for step in word.steps:
        pieces[step.position : step.position + 2] = [harmless(step.left + step.right)]
        why = harmless(f"{step.left} + {step.right}")
        yield "·".join(pieces).ljust(width) + click.style(f"{why}  rank {step.rank}", dim=True)
