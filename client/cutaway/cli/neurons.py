"""`cutaway inspect neurons`: which neurons of the MLPs a prompt drives hardest, and at which of its tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from cutaway.cli.asking import Places, asked, asking, show
from cutaway.cli.connection import connect

if TYPE_CHECKING:
    from cutaway.arrays import Array
    from cutaway.client import Client
    from cutaway.looking import Prompt


@click.command()
@asking
@click.option("--layers", type=Places(), metavar="LIST", default="all", help="Such as 3 or 4-9.  [default: all]")
@click.option("--position", type=int, default=-1, metavar="N", help="Driven at which token.  [default: the last]")
@click.option("--top", type=click.IntRange(1, 64), default=12, show_default=True, metavar="N", help="How many neurons.")
def neurons(
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
    """Show the neurons with the largest activations (of either sign) at a token of PROMPT, and what they do elsewhere.

    A neuron is named by its layer and its place in it, as 20.705. Its activation is a value of `mlp.hook_post`: what
    the MLP's last matrix takes.
    """
    with connect(timeout) as client:
        ask = asked(client, prompt, as_chat, token_ids)
        chosen = strongest(client, ask.prompt, layers, position, top)
        array = activations(client, ask.prompt, chosen).labelled(ask.tokens)
    place = range(len(ask.tokens))[position]
    title = f"the {len(chosen)} strongest neurons at {ask.tokens[place]!r} (position {place})"
    show(array, [f"{layer}.{neuron}" for layer, neuron in chosen], title, png, as_json)


def strongest(
    client: Client, prompt: Prompt, layers: list[int] | None, position: int, top: int
) -> list[tuple[int, int]]:
    """Layer and number of the neurons with the activations of largest size, the largest first."""
    from cutaway.capture import Capture

    capture = Capture("blocks.*.mlp.hook_post", layers=layers, positions=[position], top_k=top)
    seen = client.trace(prompt, captures=[capture])
    found = [
        (abs(float(value)), int(name.split(".")[1]), int(neuron))
        for name, array in seen.items()
        for value, neuron in zip(array.values[0], array.indices.values[0], strict=True)
    ]
    return [(layer, neuron) for _, layer, neuron in sorted(found, reverse=True)[:top]]


def activations(client: Client, prompt: Prompt, chosen: list[tuple[int, int]]) -> Array:
    """What neurons do at every position, [neuron, pos]."""
    import numpy as np

    from cutaway.capture import Capture

    by_layer: dict[int, list[int]] = {}
    for layer, neuron in chosen:
        by_layer.setdefault(layer, []).append(neuron)
    captures = [Capture(f"blocks.{layer}.mlp.hook_post", elements=sorted(each)) for layer, each in by_layer.items()]
    seen = client.trace(prompt, captures=captures)
    rows = [seen[f"blocks.{layer}.mlp.hook_post"].sel(d_mlp=neuron) for layer, neuron in chosen]
    at = {"neuron": tuple(neuron for _, neuron in chosen), "pos": rows[0].at["pos"]}
    at["layer"] = tuple(layer for layer, _ in chosen)
    values = np.stack([row.values for row in rows])
    return replace(rows[0], values=values, axes=("neuron", "pos"), at=at, name="blocks.*.mlp.hook_post")
