"""What the commands that look inside have in common: whose values to show, and where the pictures go."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cutaway.cli.connection import connection_options
from cutaway.cli.generate import conversation, print_json, read
from cutaway.cli.options import timeout_option, token_ids

if TYPE_CHECKING:
    from cutaway.arrays import Array
    from cutaway.client import Client
    from cutaway.looking import Prompt

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
PLACES = re.compile(r"(-?\d+)(?:-(\d+))?")


class Places(click.ParamType[list[int] | None]):
    """Places such as "3", "0,5,-1", "4-9" or "all" (None)."""

    name = "places"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int] | None:
        """The places that a text names."""
        if value == "all":
            return None
        found: list[int] = []
        for part in value.split(","):
            match = PLACES.fullmatch(part.strip())
            if match is None:
                self.fail(f"{value!r} is not of the form 3, 0,5,-1, 4-9 or all", param, ctx)
            first, last = int(match[1]), int(match[2] or match[1])
            found.extend(range(first, last + 1))
        if not found:
            self.fail(f"{value!r} names nothing", param, ctx)
        return found


def asking(command: Decorated) -> Decorated:
    """Add the prompt, and what is done with what is found."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        connection_options,
        timeout_option,
        click.option("--png", metavar="FILE", help="Also save the picture (needs the extra `plot`)."),
        click.option("--token-ids", type=token_ids, metavar="IDS", help="The prompt as token ids, such as 1,2,3."),
        click.option("--chat", "as_chat", is_flag=True, help="PROMPT is a user's message for the chat template."),
        click.argument("prompt", required=False),
    ):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt, and the text of each of its tokens."""

    prompt: Prompt
    tokens: tuple[str, ...]


def asked(client: Client, prompt: str | None, as_chat: bool, ids: Sequence[int] | None) -> Asked:
    """The prompt that was given, or standard input."""
    if ids is not None:
        if prompt is not None:
            raise click.UsageError("--token-ids: takes the place of PROMPT")
        return Asked(ids, client.detokenize(ids).texts)
    said = read(prompt)
    if as_chat:
        messages = conversation(None, said)
        return Asked(messages, client.tokenize(messages=messages).texts)
    return Asked(said, client.tokenize(said).texts)


def array_json(array: Array) -> dict[str, object]:
    """An array for scripts: what its axes are, and where on them its values lie."""
    import numpy as np

    values = array.values
    if values.dtype.kind == "f":  # JSON has no infinity
        values = values.astype(object)
        values[~np.isfinite(array.values)] = None
    found: dict[str, object] = {
        "name": array.name,
        "axes": array.axes,
        "at": {axis: list(places) for axis, places in array.at.items()},
        "model_hash": array.model_hash,
        "values": values.tolist(),
    }
    return {**found, **{part: array_json(value) for part, value in array.parts.items()}}


def show(
    array: Array, rows: Sequence[str], title: str, png: str | None, as_json: bool, drawn: Array | None = None
) -> None:
    """Print an array [rows, positions], and save its picture if a file is named for it; pictures show `drawn`."""
    drawn = array if drawn is None else drawn
    if png is not None:
        with saving(png) as plot:
            plot.heat_map(drawn, title=title, rows=rows).savefig(png)
    if as_json:
        print_json({"title": title, "tokens": array.tokens, **array_json(array)})
        return
    from rich.console import Console

    from cutaway.cli.shades import HeatMap

    Console(highlight=False).print(HeatMap(drawn.values, rows, names(array, array.axes[1]), title))


@contextmanager
def saving(path: str) -> Iterator[ModuleType]:
    """What draws pictures; what fails while one is drawn or written is told in a line."""
    try:
        from cutaway import plot
    except ImportError:
        raise click.ClickException("--png: needs matplotlib: pip install 'cutaway[plot]'") from None
    try:
        yield plot
    except (OSError, ValueError) as error:  # ValueError: a format it does not know
        raise click.ClickException(f"{path!r} cannot be written: {error}") from None


def names(array: Array, axis: str) -> list[str]:
    """The names of an axis's places: "layer 3", or a position's token."""
    from cutaway.notebook import labels, visible

    told = labels(array, axis)
    return [visible(each) if axis in ("pos", "q_pos", "k_pos") else f"{axis} {each}" for each in told]
