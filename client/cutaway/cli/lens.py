"""`cutaway inspect lens`: what the model would say if it ended after each layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cutaway.cli.asking import Places, array_json, asked, asking, saving
from cutaway.cli.connection import connect
from cutaway.cli.generate import print_json

if TYPE_CHECKING:
    from rich.table import Table

    from cutaway.results import LensResult


@click.command()
@asking
@click.option("--layers", type=Places(), metavar="LIST", default="all", help="Such as 3 or 4-9.  [default: all]")
@click.option("--position", type=int, default=-1, metavar="N", help="After which token.  [default: the last]")
@click.option("--top", type=click.IntRange(1, 20), default=4, show_default=True, metavar="N", help="Likeliest tokens.")
def lens(
    prompt: str | None,
    as_chat: bool,
    token_ids: tuple[int, ...] | None,
    layers: list[int] | None,
    position: int,
    top: int,
    png: str | None,
    timeout: float | None,
    as_json: bool,
) -> None:
    """Show what each layer would say after PROMPT, or after standard input.

    Layer i is what block i reads; the last one, what the last block leaves, is what is served. --png draws the
    likeliest token of every layer at every position.
    """
    with connect(timeout) as client:
        ask = asked(client, prompt, as_chat, token_ids)
        found = client.logit_lens(ask.prompt, layers=layers, positions=[position], top_k=top).labelled(ask.tokens)
        assert found.tokens is not None
        assert found.texts is not None
        assert found.logprobs is not None
        if png is not None:
            every = client.logit_lens(ask.prompt, layers=layers, top_k=1).labelled(ask.tokens)
            with saving(png) as plot:
                plot.lens_map(every).savefig(png)
    if as_json:
        parts = {"ids": found.tokens, "texts": found.texts, "logprobs": found.logprobs}
        print_json({"tokens": ask.tokens, **{name: array_json(part) for name, part in parts.items()}})
        return
    from rich.console import Console

    console = Console(highlight=False)
    place = found.tokens.positions[0]
    console.print(
        f"what each layer would say after {ask.tokens[place]!r} (position {place})", style="bold", markup=False
    )
    console.print(table(found))


def table(found: LensResult) -> Table:
    """A line for each layer: its likeliest tokens, the darker the likelier."""
    import numpy as np
    from rich.table import Table
    from rich.text import Text

    from cutaway.cli.shades import short
    from cutaway.notebook import colour, visible

    assert found.tokens is not None
    assert found.texts is not None
    assert found.logprobs is not None
    drawn = Table(box=None, pad_edge=False, show_header=False)
    for layer, texts, logprobs in zip(
        found.tokens.at["layer"], found.texts.values[:, 0], found.logprobs.values[:, 0], strict=True
    ):
        cells = [Text(f"layer {layer}", style="dim")]
        for text, share in zip(texts, np.exp(logprobs), strict=True):
            ink = "white" if share > 0.5 else "black"
            cells.append(Text(f"{short(visible(text)):<13}{share:4.0%}", style=f"{ink} on {colour(share, 0, 1)}"))
        drawn.add_row(*cells)
    return drawn
