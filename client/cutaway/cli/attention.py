"""`cutaway inspect attention`: where a prompt's tokens look."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cutaway.cli.asking import Places, asked, asking, names, show
from cutaway.cli.connection import connect

if TYPE_CHECKING:
    from cutaway.arrays import Array


@click.command()
@asking
@click.option("--layers", type=Places(), metavar="LIST", default="all", help="Such as 3 or 4-9.  [default: all]")
@click.option("--heads", type=Places(), metavar="LIST", default="all", help="Query heads.  [default: all]")
@click.option("--query", type=int, default=-1, metavar="POSITION", help="Which token looks.  [default: the last]")
def attention(
    prompt: str | None,
    as_chat: bool,
    token_ids: tuple[int, ...] | None,
    layers: list[int] | None,
    heads: list[int] | None,
    query: int,
    png: str | None,
    timeout: float | None,
    as_json: bool,
) -> None:
    """Show the attention of PROMPT, or of standard input.

    One layer and one head: what every token looks at. One layer: what one token (--query) looks at, by head. Several
    layers: the same by layer, as the mean of the heads.
    """
    whole = layers is not None and heads is not None and len(layers) == len(heads) == 1
    with connect(timeout) as client:
        ask = asked(client, prompt, as_chat, token_ids)
        queries = "all" if whole else [query]
        found = client.attention(ask.prompt, layers=layers, heads=heads, queries=queries)  # type: ignore[arg-type]
    array = found.labelled(ask.tokens)
    title = f"attention of layer {array.at['layer'][0]}"
    if whole:
        array, title = array.sel(layer=array.at["layer"][0], head=array.at["head"][0]), f"{title}, {_heads(array)}"
    else:
        title = f"attention of {array.tokens[array.at['q_pos'][0]]!r} (position {array.at['q_pos'][0]})"
        array = array.sel(q_pos=array.at["q_pos"][0])
        if len(array.at["layer"]) == 1:
            title = f"{title} in layer {array.at['layer'][0]}"
            array = array.sel(layer=array.at["layer"][0])
        else:
            title = f"{title}, mean of {_heads(array)}"
            array = array.mean("head")
    show(array, names(array, array.axes[0]), title, png, as_json)


def _heads(array: Array) -> str:
    heads = array.at["head"]
    return f"head {heads[0]}" if len(heads) == 1 else f"{len(heads)} heads"
