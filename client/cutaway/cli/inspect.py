"""`cutaway inspect`: what is inside the server, drawn in the terminal."""

from __future__ import annotations

import click

from cutaway.cli.attention import attention
from cutaway.cli.cache import cache
from cutaway.cli.hidden import hidden
from cutaway.cli.lens import lens
from cutaway.cli.neurons import neurons
from cutaway.cli.points import points
from cutaway.cli.sample import sample


@click.group()
def inspect() -> None:
    """Look inside the server: a prompt's inner values, how tokens were picked, and the KV cache.

    All but `cache` ask for the scope introspect.
    """


for command in (attention, hidden, lens, neurons, points, sample, cache):
    inspect.add_command(command)
