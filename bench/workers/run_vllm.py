"""vLLM's offline engine as a worker of bench/peers.py, run by the Python that vLLM is installed in.

Arguments: the model's directory and its dtype. A line {"prompts": [[token, ...], ...], "output": n} asks for that
many greedy streams. Prefix caching is off.
"""

from __future__ import annotations

import sys
import time
from itertools import count
from typing import Any

from timeline import Come, answer_lines, rates


def main() -> None:
    """Load the model and answer."""
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    model, dtype = sys.argv[1:]
    engine = LLM(
        model, dtype=dtype, max_model_len=2048, max_num_seqs=64, enable_prefix_caching=False, seed=0,
        disable_log_stats=True,
    ).llm_engine  # fmt: skip
    names = count()

    def measure(question: dict[str, Any]) -> dict[str, Any]:
        prompts, output = question["prompts"], question["output"]
        sampling = SamplingParams(
            temperature=0, max_tokens=output, min_tokens=output, ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        streams = {str(next(names)): i for i in range(len(prompts))}
        start = time.perf_counter()
        for name, i in streams.items():
            engine.add_request(name, {"prompt_token_ids": prompts[i]}, sampling)
        comes: list[Come] = []
        while engine.has_unfinished_requests():
            answers = engine.step()
            now = time.perf_counter()
            comes += [(now, streams[answer.request_id], len(answer.outputs[0].token_ids)) for answer in answers]
        return rates(start, comes, [len(prompt) for prompt in prompts], output)

    answer_lines({"name": f"vLLM {vllm.__version__} {dtype}"}, measure)


if __name__ == "__main__":
    main()
