"""The program that renders one chat template, under limits that the operating system keeps.

`template.py` starts it. The first line of input is the template and its limits; every further line holds the variables
of one conversation and is answered by one line: {"text": ...}, {"refused": ...} (by the template) or {"failed": ...}.
It imports nothing of this package, so that it starts quickly.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Mapping
from datetime import datetime

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Refusal(TemplateError):
    """The template called `raise_exception`."""


class TooLong(Exception):
    """The text exceeds its limit."""


class Generation(Extension):
    """Hugging Face's `{% generation %}` block, which marks the assistant's words for training; here it is only text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Read the block and keep what is inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse(message: object) -> None:
    """What templates call `raise_exception`."""
    raise Refusal(str(message))


def now(layout: str) -> str:
    """What templates call `strftime_now`."""
    return datetime.now().strftime(layout)


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """What templates call `tojson`: unlike jinja2's, nothing is escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> ImmutableSandboxedEnvironment:
    """The environment that Hugging Face's templates are written for."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = now
    return made


def confine(memory_bytes: int) -> None:
    """Give up what no template needs: more memory, files, processes."""
    datetime.now().strftime("%c %Z")  # reads the time zone while files can be opened
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_NPROC):
        resource.setrlimit(kind, (0, 0))


def render(template: Template, variables: Mapping[str, object], characters: int) -> str:
    """Render, and stop when the text is longer than it may be."""
    parts: list[str] = []
    length = 0
    for part in template.generate(**variables):
        length += len(part)
        if length > characters:
            raise TooLong
        parts.append(part)
    return "".join(parts)


def answer(source: str, variables: Mapping[str, object], characters: int) -> dict[str, str]:
    """Render one conversation, or say what went wrong."""
    try:
        return {"text": render(environment().from_string(source), variables, characters)}
    except TooLong:
        return {"failed": f"makes more than {characters} characters"}
    except MemoryError:
        return {"failed": "takes too much memory"}
    except (TemplateSyntaxError, SecurityError) as error:
        return {"failed": f"is broken: {error}"}
    except Refusal as error:
        return {"refused": str(error)}
    except Exception as error:  # a template is a program and can fail in any way
        return {"refused": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Answer conversations until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which then ends this process
    setting = json.loads(sys.stdin.buffer.readline())
    confine(setting["memory_bytes"])
    for line in sys.stdin.buffer:
        # Not caught, SIGPROF ends the process, in the middle of whatever it does.
        signal.setitimer(signal.ITIMER_PROF, setting["cpu_seconds"])
        reply = json.dumps(answer(setting["source"], json.loads(line), setting["characters"])).encode() + b"\n"
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
