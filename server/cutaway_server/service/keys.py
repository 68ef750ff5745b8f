"""`cutaway-server keys`: make API keys and their entries for the file of --api-keys."""

from __future__ import annotations

import os
import re
from pathlib import Path

import click

from cutaway_server.service.caller import Scope
from cutaway_server.service.credentials import NAME, CredentialsError, digest, new_key, read_credentials


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def keys() -> None:
    """Make API keys."""


@keys.command()
@click.argument("name")
@click.option("--scopes", required=True, metavar="SCOPE,...", help=f"What it may do: {', '.join(Scope)}.")
@click.option("--tenant", metavar="TENANT", help="Whose pages and requests it shares.  [default: NAME]")
@click.option("--file", type=click.Path(path_type=Path), help="The file to add the entry to, made if there is none.")
def new(name: str, scopes: str, tenant: str | None, file: Path | None) -> None:
    """Make a key called NAME.

    Prints the key, which is stored nowhere, and its entry for the file of --api-keys; with --file, adds the entry to
    that file and prints the key alone. A running server reads the file again on SIGHUP.
    """
    wanted = [scope.strip() for scope in scopes.split(",")]
    for scope in wanted:
        if scope not in list(Scope):
            raise click.UsageError(f"--scopes: {scope!r} is no scope; there are {', '.join(Scope)}")
    for option, value in (("NAME", name), ("--tenant", tenant or name)):
        if not re.fullmatch(NAME, value):
            raise click.UsageError(f"{option}: {value!r} must be 1 to 64 characters of [A-Za-z0-9._-]")
    key = new_key()
    listed = ", ".join(f'"{scope}"' for scope in wanted)
    entry = f'[[key]]\nname = "{name}"\nsha256 = "{digest(key)}"\nscopes = [{listed}]\ntenant = "{tenant or name}"\n'
    if file is None:
        click.echo(f"{key}\n\n{entry}", nl=False)
        return
    _add(file, name, entry)
    click.echo(key)


def _add(file: Path, name: str, entry: str) -> None:
    """Append an entry, unless the file would be wrong with it."""
    try:
        there = file.read_text(encoding="utf-8") if file.exists() else ""
        if there:
            known = read_credentials(file)
            if any(caller.name == name for _, caller in known.keys):
                raise click.ClickException(f"{str(file)!r} has a key called {name!r} already")
        with open(file, "a", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600)) as out:
            out.write(("\n" if there else "") + entry)
    except CredentialsError as error:
        raise click.ClickException(str(error).removeprefix("--api-keys: ")) from None
    except OSError as error:
        raise click.ClickException(f"{str(file)!r} cannot be written: {error.strerror}") from None
