"""Our engine without the wire, as a worker of bench/peers.py: lines of JSON in, lines of JSON out.

Arguments are the server's. A line {"prompts": [[token, ...], ...], "output": n} asks for that many greedy streams.
"""

from __future__ import annotations

import sys
import time
from itertools import count
from typing import Any

from cutaway_server.config import ConfigError, read_config
from cutaway_server.engine.build import build_engine
from cutaway_server.errors import ModelError
from cutaway_server.model.open import open_model
from cutaway_server.request import Request, Sampled, SamplingParams
from timeline import Come, answer_lines, rates


def main() -> None:
    """Build the engine and answer."""
    try:
        config = read_config(sys.argv[1:], {})
        engine, facts = build_engine(config, open_model(config.model))
    except (ConfigError, ModelError) as error:
        raise SystemExit(str(error)) from None
    names = count()

    def measure(question: dict[str, Any]) -> dict[str, Any]:
        prompts, output = question["prompts"], question["output"]
        sampling = SamplingParams(seed=0, max_tokens=output, temperature=0.0)
        streams = {f"bench-{next(names)}": i for i in range(len(prompts))}
        start = time.perf_counter()
        for name, i in streams.items():
            engine.add(Request(name, tuple(prompts[i]), sampling, time.monotonic(), prefix_caching=False))
        comes: list[Come] = []
        while engine.has_work:
            events = engine.step()
            now = time.perf_counter()
            comes += [(now, streams[name], 1) for name, event in events if isinstance(event, Sampled)]
        return rates(start, comes, [len(prompt) for prompt in prompts], output)

    answer_lines({"name": f"{facts.dtype}, {facts.kernels} kernels"}, measure)


if __name__ == "__main__":
    main()
