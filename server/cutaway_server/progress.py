"""A bar for what takes long at start, on a terminal; elsewhere the log's lines are enough."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int, int], None]  # bytes done, bytes in all


@contextmanager
def bar(what: str) -> Iterator[Advance]:
    """A bar of bytes on stderr for as long as the block runs; it appears when it first advances."""
    from tqdm import tqdm

    with tqdm(desc=what, unit="B", unit_scale=True, disable=None, file=sys.stderr, delay=0.01) as shown:

        def advance(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield advance


def silent(done: int, total: int) -> None:
    """Show nothing."""
