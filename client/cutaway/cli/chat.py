"""`cutaway chat`: a conversation at the terminal."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

import click

from cutaway.cli.connection import connect, connection_options
from cutaway.cli.options import given, sampling_options, timeout_option
from cutaway.cli.screen import figures, write
from cutaway.errors import CutawayError
from cutaway.options import GenerateOptions, Message

if TYPE_CHECKING:
    from cutaway.client import Client

HELP = "/reset forgets the conversation, /quit ends it, Ctrl-C stops an answer, Ctrl-D ends."
# Readline must not count what is invisible: between \001 and \002.
PROMPT = "\001\033[1;36m\002you>\001\033[0m\002 "


@click.command()
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@sampling_options
@timeout_option
@connection_options
def chat(system: str | None, timeout: float | None, **options: object) -> None:
    """Talk to the model; it remembers the conversation.

    /reset forgets it, /quit or Ctrl-D ends. Ctrl-C stops an answer (and cancels it on the server); at the prompt it
    ends the program with exit code 130. Lines are read from standard input if that is not a terminal.
    """
    with connect(timeout) as client:
        talk = Conversation(client, system, given(options))
        if sys.stdin.isatty():
            name = client.model().name
            click.secho(f"{name} at {client.address}. {HELP}", dim=True)
        while talk.turn():
            pass


class Conversation:
    """The turns so far, and how to take the next one."""

    def __init__(self, client: Client, system: str | None, options: GenerateOptions) -> None:
        self._client = client
        self._options = options
        self._begin: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._turns = list(self._begin)

    def turn(self) -> bool:
        """Read a line and do what it says; whether to go on."""
        line = read_line()
        match line and line.strip():
            case None | "/quit" | "/exit":
                return False
            case "":
                pass
            case "/reset":
                self._turns = list(self._begin)
                click.secho("The conversation is forgotten.", dim=True)
            case "/help":
                click.secho(HELP, dim=True)
            case said:
                self._reply(said)
        return True

    def _reply(self, said: str) -> None:
        """Stream the answer; a turn that failed or was refused is forgotten, one that was stopped is kept."""
        self._turns.append({"role": "user", "content": said})
        options: GenerateOptions = {**self._options, "messages": self._turns}
        stream = self._client.generate(**options)
        try:
            with stream:
                write(stream)
        except KeyboardInterrupt:
            click.secho("\n(stopped)", dim=True)
        except CutawayError as error:
            if not sys.stdin.isatty():
                raise
            click.secho(str(error), fg="red", err=True)
            self._turns.pop()
            return
        self._turns.append({"role": "assistant", "content": stream.text})
        if sys.stderr.isatty() and stream.usage and stream.timings:
            click.secho(figures(stream.usage, stream.timings), dim=True, err=True)


def read_line() -> str | None:
    """The next line, or None at the end of the input."""
    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives `input` a history and an editor)
    try:
        return input(PROMPT)
    except EOFError:
        click.echo()
        return None
