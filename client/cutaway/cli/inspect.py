"""`cutaway inspect`: what is inside the server, drawn in the terminal."""

from __future__ import annotations

import click

from cutaway.cli.cache import cache
from cutaway.cli.sample import sample


@click.group()
def inspect() -> None:
    """Look inside the server."""


inspect.add_command(cache)
inspect.add_command(sample)
