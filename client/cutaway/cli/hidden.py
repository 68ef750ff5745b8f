"""`cutaway inspect hidden`: how long the vectors of a point are, by layer and position."""

from __future__ import annotations

from dataclasses import replace

import click

from cutaway.cli.asking import Places, asked, asking, names, show
from cutaway.cli.connection import connect


@click.command()
@asking
@click.option("--layers", type=Places(), metavar="LIST", default="all", help="Such as 3 or 4-9.  [default: all]")
@click.option(
    "--point", default="resid_post", show_default=True, metavar="NAME", help="A point that layers have: see `points`."
)
@click.option("--head", type=int, metavar="N", help="Of a point that has heads: which.")
def hidden(
    prompt: str | None,
    as_chat: bool,
    token_ids: tuple[int, ...] | None,
    layers: list[int] | None,
    point: str,
    head: int | None,
    png: str | None,
    timeout: float | None,
    as_json: bool,
) -> None:
    """Show the length of hidden states of PROMPT, or of standard input, by layer and position.

    The Euclidean norm is computed on the server. Pictures show its logarithm, since a first token is often a hundred
    times as long as the others; --json has the lengths.
    """
    import numpy as np

    from cutaway.capture import Capture

    with connect(timeout) as client:
        ask = asked(client, prompt, as_chat, token_ids)
        every = point if "*" in point else f"{point}.*"
        capture = Capture(every, norm=True, layers=layers, heads=head)
        seen = client.trace(ask.prompt, captures=[capture])
    [first, *_] = seen.values()
    if first.ndim > 1 and head is None:
        raise click.UsageError(f"--point: {point} has heads; choose one with --head")
    array = seen.stacked(f"blocks.*.{first.name.split('.', 2)[2]}").labelled(ask.tokens)
    title = f"length of {array.name.removeprefix('blocks.*.')}" + ("" if head is None else f" of head {head}")
    array = array if head is None else array.sel(head=array.at["head"][0])
    shortest = array.values[array.values > 0].min(initial=np.inf)
    with np.errstate(divide="ignore"):  # a vector of zeros has no colour
        powers = replace(array, values=np.log10(array.values / shortest))
    show(array, names(array, "layer"), f"{title}: log10(length / {shortest:.4g})", png, as_json, powers)
