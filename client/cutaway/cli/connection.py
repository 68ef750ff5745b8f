"""Which server the command line talks to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from cutaway.client import Client

ADDRESS = "CUTAWAY_ADDRESS"
Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def remember_address(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    """Keep the address for `connect`; a command's own --address comes later and wins."""
    if value is not None:
        ctx.meta[ADDRESS] = value


def address_option(command: Decorated) -> Decorated:
    """Let --address also stand behind the command's name."""
    return click.option(
        "--address",
        metavar="HOST:PORT",
        expose_value=False,
        callback=remember_address,
        help="Where the server listens.",
    )(command)


def connect(timeout: float | None = None) -> Client:
    """A client for the address that was given."""
    from cutaway.client import Client

    return Client(click.get_current_context().meta[ADDRESS], timeout=timeout)
