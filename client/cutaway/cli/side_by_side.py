"""Several completions while they are made: on a terminal a line for each, with the end of what it has so far."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from typing import TYPE_CHECKING

from cutaway.cli.screen import harmless

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from cutaway.client import Stream

PAUSE_SECONDS = 0.1  # between two pictures
KEPT = 1000  # characters of each completion, more than a line has


def watch(stream: Stream) -> None:
    """Read a stream to its end; show what comes on stderr, if that is a terminal, and clear it away at the end."""
    if not sys.stderr.isatty():
        for _ in stream:
            pass
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    texts: defaultdict[int, str] = defaultdict(str)
    drawn = 0.0
    with Live(_lines(texts, console), console=console, auto_refresh=False, transient=True) as picture:
        picture.refresh()
        for token in stream:
            texts[token.index] = (texts[token.index] + token.text)[-KEPT:]
            if time.monotonic() - drawn > PAUSE_SECONDS:
                picture.update(_lines(texts, console), refresh=True)
                drawn = time.monotonic()


def _lines(texts: dict[int, str], console: Console) -> Text:
    from rich.text import Text

    if not texts:
        return Text("waiting for the first token", style="dim")
    shown = Text(no_wrap=True, overflow="crop")
    height = max(1, console.height - 2)
    for index in sorted(texts)[:height]:
        label = f"{index:>3} "
        tail = _fitting(" ".join(harmless(texts[index]).split()), console.width - len(label))
        shown.append(label, style="cyan").append(f"{tail}\n")
    if len(texts) > height:
        shown.append(f"and {len(texts) - height} more\n", style="dim")
    return shown


def _fitting(text: str, width: int) -> str:
    """The end of a text that fits a line."""
    from rich.cells import cell_len

    tail = text[-max(1, width) :]
    while cell_len(tail) > width and len(tail) > 1:
        tail = tail[1:]
    return tail
