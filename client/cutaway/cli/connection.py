"""Which server the command line talks to, and who it says it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cutaway.channel import DEFAULT_ADDRESS

if TYPE_CHECKING:
    from cutaway.client import Client

META = "cutaway."
Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def remember(ctx: click.Context, parameter: click.Parameter, value: object) -> None:
    """Keep a value for `connect`; a command's own option comes later and wins."""
    if value is not None:
        ctx.meta[META + str(parameter.name)] = value


def connection_options(command: Decorated) -> Decorated:
    """Let --address and who is asking also stand behind the command's name."""
    return _options(command, first=False)


def first_connection_options(command: Decorated) -> Decorated:
    """The same options before the command's name: these look into the environment, too."""
    return _options(command, first=True)


def _options(command: Decorated, *, first: bool) -> Decorated:
    text = _from_environment if first else _option
    declared = (
        text("--address", metavar="HOST:PORT", help="Where the server listens.", **_default(first)),
        text("--api-key", metavar="KEY", help="Who you are. Others see a command's options: prefer the variable."),
        text("--tls/--no-tls", "tls", default=None, help="Speak TLS. [default: with --tls-ca or --cert]"),
        text("--tls-ca", metavar="FILE", help="Trust only the authorities in this file (PEM)."),
        text("--cert", metavar="FILE", help="Your certificate chain (PEM), for servers that ask for one."),
        text("--cert-key", metavar="FILE", help="Its private key (PEM)."),
    )
    for option in reversed(declared):
        command = option(command)
    return command


def _option(*names: str, **settings: Any) -> Callable[[Decorated], Decorated]:
    return click.option(*names, expose_value=False, callback=remember, **settings)


def _from_environment(*names: str, **settings: Any) -> Callable[[Decorated], Decorated]:
    variable = "CUTAWAY_" + names[0].split("/")[0].removeprefix("--").replace("-", "_").upper()
    return _option(*names, envvar=variable, show_envvar=True, is_eager=True, **settings)


def _default(first: bool) -> dict[str, Any]:
    return {"default": DEFAULT_ADDRESS, "show_default": True} if first else {}


def connect(timeout: float | None = None) -> Client:
    """A client for the address, and with the proof, that were given."""
    from cutaway.client import Client

    given = {key.removeprefix(META): value for key, value in click.get_current_context().meta.items()}
    cert, key, authority = (given.get(name) for name in ("cert", "cert_key", "tls_ca"))
    if (cert is None) != (key is None):
        raise click.UsageError("--cert and --cert-key: one needs the other")
    tls = given.get("tls")
    if tls is False and authority is not None:
        raise click.UsageError("--tls-ca: does nothing with --no-tls")
    try:
        return Client(
            given["address"],
            api_key=given.get("api_key"),
            tls=authority if authority is not None else tls,
            cert=None if cert is None or key is None else (cert, key),
            timeout=timeout,
        )
    except OSError as error:
        raise click.ClickException(f"{error.filename!r} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise click.ClickException(str(error)) from None
