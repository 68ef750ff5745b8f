"""What the benchmarks ask: a workload file, and prompts drawn from its tokens. Run to write another file.

`workload.json` holds 64 requests in SmolLM2's tokens: prompts of 32 to 768 tokens of English (log-uniform), 16 to 256
tokens of output (uniform), none sharing a prefix. Another tokenizer needs another file.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

WORKLOAD = Path(__file__).with_name("workload.json")


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: its prompt's tokens, and how many tokens are generated, whatever they are."""

    prompt: tuple[int, ...]
    output: int


def read_workload(path: Path, limit: int | None = None) -> list[Ask]:
    """The requests of a file, or the first `limit` of them.

    Raises:
        SystemExit: the file cannot be read, or is no workload.
    """
    try:
        requests = json.loads(path.read_text())["requests"][:limit]
        return [Ask(tuple(r["prompt_token_ids"]), r["output_len"]) for r in requests]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} is no workload: {type(error).__name__}: {error}") from None


def drawn(asks: Sequence[Ask], n: int, prompt: int, output: int, source: random.Random) -> list[Ask]:
    """`n` requests of `prompt` tokens each, cut at random from the tokens of `asks` laid end to end."""
    tokens = [token for ask in asks for token in ask.prompt]
    if len(tokens) < prompt:
        tokens *= math.ceil(prompt / len(tokens)) + 1
    starts = (source.randrange(len(tokens) - prompt + 1) for _ in range(n))
    return [Ask(tuple(tokens[start : start + prompt]), output) for start in starts]


def english() -> str:
    """Text that every Python carries: its help topics."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def made(tokens: Sequence[int], n: int, prompt: tuple[int, int], output: tuple[int, int], seed: int) -> Iterator[Ask]:
    """`n` requests of lengths within these bounds, cut from `tokens`, the same for the same seed."""
    source = random.Random(seed)
    for _ in range(n):
        length = round(math.exp(source.uniform(math.log(prompt[0]), math.log(prompt[1]))))
        start = source.randrange(len(tokens) - length)
        yield Ask(tuple(tokens[start : start + length]), source.randint(*output))


def main() -> None:
    """Write a workload for a model's tokenizer to stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="whose tokenizer, as for cutaway-server [%(default)s]")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, nargs=2, default=(32, 768), metavar=("FROM", "TO"), help="tokens")
    parser.add_argument("--output", type=int, nargs=2, default=(16, 256), metavar=("FROM", "TO"), help="tokens")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from cutaway_server.model.open import open_model

    tokens = open_model(options.model).text.encode(english(), add_special_tokens=False).ids
    asks = list(made(tokens, options.requests, options.prompt, options.output, options.seed))
    requests = [
        {"id": i, "prompt_token_ids": ask.prompt, "prompt_len": len(ask.prompt), "output_len": ask.output}
        for i, ask in enumerate(asks)
    ]
    json.dump(
        {
            "seed": options.seed, "n": len(asks), "ignore_eos": True, "temperature": 0,
            "total_prompt_tokens": sum(len(ask.prompt) for ask in asks),
            "total_output_tokens": sum(ask.output for ask in asks), "requests": requests,
        },
        sys.stdout,
    )  # fmt: skip


if __name__ == "__main__":
    main()
