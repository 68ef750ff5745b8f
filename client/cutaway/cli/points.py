"""`cutaway inspect points`: what can be read and changed in the served model."""

from __future__ import annotations

from dataclasses import asdict

import click

from cutaway.cli.connection import connect, connection_options
from cutaway.cli.generate import print_json
from cutaway.cli.options import timeout_option


@click.command()
@timeout_option
@connection_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def points(timeout: float | None, as_json: bool) -> None:
    """List the points: names, axes, what an edit may change, and what reading one costs a step."""
    with connect(timeout) as client:
        found = client.list_points()
    if as_json:
        print_json({"points": [asdict(point) for point in found]})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("point", "axes", "edits", "cost", "what it is"):
        table.add_column(name, no_wrap=name in ("point", "edits", "cost"))
    for point in found:
        sizes = (f"{axis}={size}" if size else axis for axis, size in zip(point.axes, point.shape, strict=True))
        table.add_row(point.name, ", ".join(sizes), "yes" if point.writable else "", point.cost, point.description)
    Console(highlight=False).print(table)
