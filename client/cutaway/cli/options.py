"""The command line's options for everything that `generate` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import click

from cutaway.options import GenerateOptions

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def bias(text: str) -> tuple[int, float]:
    """A token id and what is added to its logit: "42=-1.5"."""
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not of the form ID=BIAS, such as 42=-1.5") from None


def token_ids(text: str) -> tuple[int, ...]:
    """Token ids with commas or blanks between them: "1,2,3"."""
    try:
        return tuple(int(token) for token in text.replace(",", " ").split())
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of token ids, such as 1,2,3") from None


def number(name: str, text: str) -> Callable[[Decorated], Decorated]:
    """An option whose value is a real number."""
    return click.option(f"--{name}", type=float, metavar="X", help=text)


def count(name: str, text: str) -> Callable[[Decorated], Decorated]:
    """An option whose value is an integer."""
    return click.option(f"--{name}", type=int, metavar="N", help=text)


def flag(name: str, text: str) -> Callable[[Decorated], Decorated]:
    """An option that is on, off, or unset: then the server decides."""
    return click.option(f"--{name}/--no-{name}", default=None, help=text)


CHOOSING = (
    number("temperature", "Divides the logits; 0 is greedy."),
    count("top-k", "Keep the N likeliest tokens; 0 keeps all."),
    number("top-p", "Keep the likeliest tokens of this mass."),
    number("min-p", "Keep tokens at least this likely relative to the likeliest."),
    number("typical-p", "Keep this mass of tokens of typical surprise."),
    number("repetition-penalty", "On tokens seen in prompt and output; 1 is none."),
    number("presence-penalty", "Subtracted once from tokens seen in the output."),
    number("frequency-penalty", "Subtracted per occurrence in the output."),
    click.option(
        "--logit-bias", type=bias, metavar="ID=BIAS", multiple=True, help="Added to a token's logit. Repeatable."
    ),
    click.option("--bad-word", "bad_words", metavar="TEXT", multiple=True, help="Never generate this. Repeatable."),
)

SAMPLING = (
    count("max-tokens", "At most this many tokens.  [default: what is left of the context]"),
    *CHOOSING,
    count("seed", "The same seed gives the same tokens."),
    click.option("--stop", metavar="TEXT", multiple=True, help="A text that ends the completion. Repeatable."),
    click.option(
        "--stop-token-id",
        "stop_token_ids",
        type=int,
        metavar="ID",
        multiple=True,
        help="A token that ends the completion. Repeatable.",
    ),
    count("min-tokens", "No end before this many tokens."),
    flag("ignore-eos", "Go on past the model's end tokens."),
    flag("skip-special-tokens", "Leave special tokens out of the text."),
    flag("prefix-caching", "Read and feed the prefix cache."),
)

OUTPUT = (
    click.option("-n", "--n", type=int, metavar="N", help="Completions of the prompt."),
    count("logprobs", "Log-probability of each token, and of the N likeliest ones."),
    count("prompt-logprobs", "Likewise for the prompt's tokens."),
    flag("echo", "Give the prompt first."),
    flag("parse-special-tokens", "Read special tokens in the prompt as tokens."),
    flag("add-special-tokens", "Add the tokens the model expects around a prompt."),
    click.option("--request-id", metavar="NAME", help="The request's name, for the logs."),
)


def sampling_options(command: Decorated) -> Decorated:
    """Add what decides how tokens are chosen, and when to stop."""
    return _add(SAMPLING, command)


def choosing_options(command: Decorated) -> Decorated:
    """Add what decides which token is picked."""
    return _add(CHOOSING, command)


def output_options(command: Decorated) -> Decorated:
    """Add what decides what is told, and how the prompt is read."""
    return _add(OUTPUT, command)


def timeout_option(command: Decorated) -> Decorated:
    """Add --timeout."""
    return click.option("--timeout", type=float, metavar="SECONDS", help="Give up after this long.")(command)


def _add(options: tuple[Callable[[Decorated], Decorated], ...], command: Decorated) -> Decorated:
    for option in reversed(options):
        command = option(command)
    return command


def given(options: Mapping[str, object]) -> GenerateOptions:
    """The options that were given, as keywords of `generate`."""
    kept = {name: value for name, value in options.items() if value is not None and value != ()}
    if "logit_bias" in kept:
        kept["logit_bias"] = dict(cast("tuple[tuple[int, float], ...]", kept["logit_bias"]))
    return cast("GenerateOptions", kept)
