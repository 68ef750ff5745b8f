"""The command `cutaway`: generate, chat, tokenize, model, inspect and top, for people and (--json) for scripts.

Nothing heavy is imported here: `cutaway --help` answers at once, gRPC and rich load when a command runs.
"""

from __future__ import annotations

import os

import click

from cutaway.cli.chat import chat
from cutaway.cli.connection import first_connection_options
from cutaway.cli.generate import generate
from cutaway.cli.inspect import inspect
from cutaway.cli.model import model
from cutaway.cli.tokenize import tokenize
from cutaway.cli.top import top
from cutaway.errors import CutawayError

INTERRUPTED = 130  # 128 + SIGINT, as shells count


class Commands(click.Group):
    """A group whose errors are one line on stderr and exit code 1, and whose Ctrl-C is exit code 130."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except CutawayError as error:
            raise click.ClickException(" ".join(str(error).split())) from error
        except KeyboardInterrupt:
            click.echo(err=True)
            ctx.exit(INTERRUPTED)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@first_connection_options
@click.version_option(package_name="cutaway")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Talk to a Cutaway server."""
    if os.environ.get("NO_COLOR"):
        ctx.color = False


for command in (generate, chat, tokenize, model, inspect, top):
    main.add_command(command)
