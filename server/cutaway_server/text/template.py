"""Renders chat templates, in a process of their own.

A template comes with the model and is a program that nobody has read. jinja2's sandbox keeps it from Python's
internals; but not from running for ever or filling the memory, and a thread that does can't be stopped. A process can:
the operating system holds it to its processor time and memory, and when it dies the next one starts.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from cutaway_server.errors import InvalidField, Unsupported
from cutaway_server.text.chat import ChatMessage

_PROGRAM = Path(__file__).with_name("template_process.py")


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """What one rendering may use."""

    cpu_seconds: float = 2.0
    memory_bytes: int = 512 << 20
    characters: int = 8 << 20


class ChatTemplate:
    """A chat template and the process that renders it, started with the first conversation."""

    def __init__(self, source: str, named_tokens: Mapping[str, str], limits: TemplateLimits | None = None) -> None:
        self._source = source
        self._named_tokens = dict(named_tokens)
        self._limits = limits or TemplateLimits()
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ender: weakref.finalize[..., ChatTemplate] | None = None

    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool) -> str:
        """The conversation as text.

        Raises:
            InvalidField: the template refuses the conversation.
            Unsupported: there is no template, it is broken, or it exceeds its limits.
        """
        if not self._source:
            raise Unsupported("this model has no chat template; send the prompt as text")
        variables = {
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._named_tokens,
        }
        with self._lock:
            reply = self._exchange(json.dumps(variables).encode() + b"\n")
        if "text" in reply:
            return reply["text"]
        if "refused" in reply:
            roles = [message.role for message in messages]
            raise InvalidField("chat.messages", roles, f"the model's chat template says: {reply['refused']}")
        raise Unsupported(f"the model's chat template {reply['failed']}")

    def _exchange(self, line: bytes) -> dict[str, str]:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer.endswith(b"\n"):
            return {"failed": self._epitaph()}
        reply: dict[str, str] = json.loads(answer)
        return reply

    def _start(self) -> subprocess.Popen[bytes]:
        self._end()
        process = subprocess.Popen(  # noqa: S603 (our own program)
            [sys.executable, "-P", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._process = process
        self._ender = weakref.finalize(self, _end, process)
        limits = self._limits
        setting = {"source": self._source, "cpu_seconds": limits.cpu_seconds, "memory_bytes": limits.memory_bytes}
        assert process.stdin is not None
        process.stdin.write(json.dumps({**setting, "characters": limits.characters}).encode() + b"\n")
        return process

    def _epitaph(self) -> str:
        """End the process that gave no answer, and say what it died of."""
        assert self._process is not None
        self._process.kill()  # no effect on one that is dead already
        code = self._process.wait()
        self._end()
        if code == -signal.SIGPROF:
            return f"takes more than {self._limits.cpu_seconds:g} s of processor time"
        return f"ended its process with code {code}"

    def _end(self) -> None:
        if self._ender is not None:
            self._ender()
        self._process = self._ender = None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):  # what was still to be written has no reader any more
                pipe.close()
