"""`cutaway inspect sample`: how a generated token came to be picked."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import click

from cutaway.cli.connection import connect, connection_options
from cutaway.cli.options import choosing_options, count, given, timeout_option

if TYPE_CHECKING:
    from cutaway.replay_wire import ReplayOptions


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("request_id")
@click.argument("position", type=int)
@click.option("--index", type=int, metavar="N", help="Which of its completions.  [default: 0]")
@count("count", "Show the N likeliest tokens.  [default: 10]")
@choosing_options
@timeout_option
@connection_options
def sample(request_id: str, position: int, timeout: float | None, **options: object) -> None:
    """Show how the token at POSITION of REQUEST_ID was picked, of one that runs or has ended and is kept.

    POSITION counts from the prompt's start, or, below 0, from the end. With other sampling parameters it also shows
    what the same random number would have picked. Asks for the scope introspect.
    """
    with connect(timeout) as client:
        click.echo(repr(client.replay_sample(request_id, position, **cast("ReplayOptions", given(options)))))
