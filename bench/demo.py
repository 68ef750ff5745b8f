"""`make demo`: serve a real model, stream an answer, and look at what can be seen of its making.

Everything is asked through the public client, of a server that is started here and stopped at the end. What a reader
could not check by eye is checked here; the exit code is 0 only if all of it holds.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cutaway import Answer, Client, CutawayError, Token
from cutaway.cli.screen import figures, harmless
from rich.console import Console
from rich.table import Table
from rich.text import Text

QUESTION = "What is gravity?"
LONGER = "Tell me a story about a lighthouse."
START_SECONDS = 600  # a first start unpacks the model
STOP_SECONDS = 60
SHOWN = 12  # tokens in the table
ALTERNATIVES = 3

console = Console(highlight=False)


class DemoError(Exception):
    """Something is not as it should be."""


def main() -> int:
    """Run the demonstration; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as for cutaway-server [%(default)s]")
    parser.add_argument("--max-tokens", type=int, default=96, help="length of the answer [%(default)s]")
    parser.add_argument("server_options", nargs="*", help="after --: options for cutaway-server")
    args = parser.parse_args()
    try:
        with served(args.model, args.server_options) as address, Client(address, timeout=START_SECONDS) as client:
            show(client, args.max_tokens, expected="gravity" if args.model == "smollm2" else "")
    except (DemoError, CutawayError) as error:
        console.print(f"\n[bold red]The demo failed:[/] {type(error).__name__}: ", Text(str(error)))
        return 1
    except KeyboardInterrupt:
        return 130
    console.print("\nEverything held, and the server is stopped. To go on: [bold]make serve[/], then", end=" ")
    console.print(f"[bold]{Path(sys.prefix).name}/bin/cutaway chat[/] in another terminal.")
    return 0


@contextmanager
def served(model: str, options: list[str]) -> Iterator[str]:
    """Start `cutaway-server`, wait until it serves, and stop it as an operator would."""
    command = Path(sys.executable).with_name("cutaway-server")
    arguments = ["--model", model, "--listen", "127.0.0.1:0", "--metrics-listen", "none", "--log-level", "warning"]
    arguments += options
    heading(f"{command.name} {' '.join(arguments)}")
    began = time.monotonic()
    try:
        process = subprocess.Popen([command, *arguments], stdout=subprocess.PIPE, text=True)
    except OSError as error:
        raise DemoError(f"cannot start the server: {error}") from error
    try:
        address = listening(process)
        console.print(f"listening on {address} after {time.monotonic() - began:.1f} s")
        yield address
        stop(process)
    finally:
        process.kill()
        process.wait()


def listening(process: subprocess.Popen[str]) -> str:
    """The address that the server tells once it serves."""
    watchdog = threading.Timer(START_SECONDS, process.kill)
    watchdog.start()
    try:
        for line in process.stdout or ():
            if line.startswith("listening on "):
                return line.removeprefix("listening on ").strip()
    finally:
        watchdog.cancel()
    raise DemoError(f"the server ended with exit code {process.wait()} before it was listening")


def stop(process: subprocess.Popen[str]) -> None:
    """Ask the server to end, and see that it does."""
    process.send_signal(signal.SIGTERM)
    try:
        code = process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        raise DemoError(f"the server did not end within {STOP_SECONDS} s of SIGTERM") from None
    require(code == 0, f"the server ended with exit code {code}")


def show(client: Client, max_tokens: int, expected: str) -> None:
    """One page of what can be seen."""
    show_model(client)
    answer = ask(client, max_tokens)
    require(expected in answer.text.lower(), f"the answer does not speak of {expected}")
    show_prompt(client)
    show_choices(client, answer)
    show_cache(client, answer, max_tokens)
    show_batch(client)


def show_model(client: Client) -> None:
    """What is served."""
    model = client.model()
    shape, limits = model.architecture, model.limits
    console.print(
        f"{model.name}: {shape.family}, {shape.n_parameters:,} parameters in {shape.n_layers} layers of "
        f"{shape.n_heads} heads, {model.dtype} on {model.device} ({model.kernels} kernels); "
        f"a KV cache of {limits.total_pages:,} pages of {limits.page_size} tokens",
    )


def ask(client: Client, max_tokens: int) -> Answer:
    """Stream the answer to the question, and keep all that came with it."""
    heading(QUESTION)
    turns = [{"role": "user", "content": QUESTION}]
    with client.generate(messages=turns, max_tokens=max_tokens, temperature=0, logprobs=ALTERNATIVES) as stream:
        for token in stream:
            console.out(harmless(token.text), end="")
            sys.stdout.flush()
    console.print()
    answer = stream.answer()
    console.print(f"({figures(answer.usage, answer.timings)}; ended by {answer.finish_reason})", style="dim")
    require(bool(answer.text.strip()), "the answer is empty")
    require(len(answer.tokens) == answer.usage.completion_tokens, "tokens were lost on the way")
    steps = [token.step for token in answer.tokens]
    require(steps == sorted(set(steps)), "the engine's steps do not grow from token to token")
    return answer


def show_prompt(client: Client) -> None:
    """The tokens that the question became."""
    heading("What the model read: the question, laid out by its chat template, as tokens")
    tokens = client.tokenize(messages=[{"role": "user", "content": QUESTION}])
    line = Text()
    for i, (piece, token) in enumerate(zip(tokens.pieces, tokens.ids, strict=True)):
        line.append(harmless(piece), style=("black on cyan", "black on green")[i % 2]).append(f" {token} ", "dim")
    console.print(line)


def show_choices(client: Client, answer: Answer) -> None:
    """The first tokens of the answer, how sure the model was, and what it might have said."""
    heading(f"How it chose its first {min(SHOWN, len(answer.tokens))} tokens")
    table = Table(box=None, header_style="dim")
    for column, width in (("step", 4), ("id", 5), ("token", 14), ("log-prob", 8), ("what else it might have said", 20)):
        table.add_column(column, no_wrap=True, min_width=width)
    for token in answer.tokens[:SHOWN]:
        require(token.logprob is not None and token.logprob <= 0, f"token {token.id} has no log-probability")
        likeliest = [top.logprob for top in token.top_logprobs]
        require(len(likeliest) == ALTERNATIVES, f"{len(likeliest)} alternatives came, not {ALTERNATIVES}")
        require(likeliest == sorted(likeliest, reverse=True), "the alternatives are not in order")
        require(token.logprob == likeliest[0], "the greedy token is not the likeliest one")
        table.add_row(
            str(token.step), str(token.id), literal(client, token.id), f"{token.logprob:.2f}", others(client, token)
        )
    console.print(table)


def others(client: Client, token: Token) -> Text:
    """The likeliest tokens at a place, but the one that was taken."""
    told = (f"{literal(client, top.id)} {top.logprob:.2f}" for top in token.top_logprobs if top.id != token.id)
    return Text("  ".join(told))


def literal(client: Client, token: int) -> str:
    """A token's text in quotes."""
    return repr(client.detokenize([token]).text)


def show_cache(client: Client, answer: Answer, max_tokens: int) -> None:
    """The same question again: its prompt need not be computed any more."""
    heading("The same question again")
    turns = [{"role": "user", "content": QUESTION}]
    again = client.complete(messages=turns, max_tokens=max_tokens, temperature=0)
    first, second = answer.timings, again.timings
    console.print(
        f"{again.usage.cached_tokens} of {again.usage.prompt_tokens} prompt tokens came from the prefix cache "
        f"({answer.usage.cached_tokens} before); the first token took {1000 * second.prefill_seconds:.0f} ms "
        f"instead of {1000 * first.prefill_seconds:.0f} ms"
    )
    require(again.token_ids == answer.token_ids, "the same question got another answer")
    require(again.usage.cached_tokens > 0, "nothing of the prompt came from the cache")


def show_batch(client: Client) -> None:
    """Two requests at once, the second while the first is running: which steps made tokens of both."""
    heading("Two requests in one batch, the second coming while the first is running")
    with client.generate(LONGER, max_tokens=48, temperature=0, ignore_eos=True) as long:
        begun = [next(long) for _ in range(4)]
        late = client.complete(QUESTION, max_tokens=16, temperature=0, ignore_eos=True)
        first = [token.step for token in (*begun, *long)]
    second = [token.step for token in late.tokens]
    shared = sorted(set(first) & set(second))
    console.print(f"first:  {len(first)} tokens in steps {first[0]} to {first[-1]}")
    console.print(f"second: {len(second)} tokens in steps {second[0]} to {second[-1]}")
    require(bool(shared), "no step served both requests")
    console.print(f"{len(shared)} steps made a token of each: one pass over the weights, two tokens")


def require(holds: bool, otherwise: str) -> None:
    """Stop the demonstration if something does not hold."""
    if not holds:
        raise DemoError(otherwise)


def heading(text: str) -> None:
    """A line between two parts."""
    console.print()
    console.rule(Text(text, "bold"), align="left")


if __name__ == "__main__":
    sys.exit(main())
