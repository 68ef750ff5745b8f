"""What each way of holding the weights costs in quality: perplexity on a fixed text, and agreement with fp32.

The text is from the documentation that comes with Python itself (`pydoc_data.topics`, PSF licence), so it is on every
machine; its digest is printed, for it differs between Python versions. `--text` takes another.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from cutaway_server.cache.pages import allocate_pages
from cutaway_server.engine.build import choose_kernels
from cutaway_server.engine.quantize import AS_IS, quantization, rounding_of
from cutaway_server.kernels.batch import Batch
from cutaway_server.model.checkpoint import Checkpoint, load_weights
from cutaway_server.model.open import open_model
from cutaway_server.model.transformer import Transformer
from torch.nn import functional as F

PAGE = 16
WAYS = ("float32", "bfloat16", "int8", "int4", AS_IS)
CPU = torch.device("cpu")


@dataclass
class Tally:
    """Sums over the text's tokens."""

    name: str
    loss: float = 0.0
    agreed: int = 0
    divergence: float = 0.0
    tokens: int = 0

    def add(self, logits: torch.Tensor, exact: torch.Tensor, following: torch.Tensor) -> None:
        """Logits [n, vocab] at n positions, those of fp32, and the tokens that follow."""
        ours, theirs = F.log_softmax(logits, -1), F.log_softmax(exact, -1)
        self.loss += float(-ours.gather(1, following[:, None]).sum(dtype=torch.float64))
        self.agreed += int((logits.argmax(-1) == exact.argmax(-1)).sum())
        self.divergence += float((theirs.exp() * (theirs - ours)).sum(dtype=torch.float64))
        self.tokens += len(following)

    def record(self) -> dict[str, float | str]:
        """What is told."""
        loss, agreed, divergence = (x / self.tokens for x in (self.loss, self.agreed, self.divergence))
        return {
            "way": self.name,
            "perplexity": float(torch.tensor(loss, dtype=torch.float64).exp()),
            "top1_agreement": agreed,
            "divergence": divergence,
            "tokens": self.tokens,
        }


def model(checkpoint: Checkpoint, way: str, kernels: str, context: int) -> tuple[Transformer, str]:
    """The model as it would be served, and what its quantisation is called."""
    dtype = torch.float32 if way == "float32" else torch.bfloat16
    weights = load_weights(checkpoint, dtype, CPU, as_is=way == AS_IS)
    name = quantization(way, checkpoint, weights)
    return Transformer(choose_kernels(kernels, checkpoint.config, weights, context, dtype, rounding_of(way))), name


def logits(model: Transformer, tokens: list[int]) -> torch.Tensor:
    """Logits [n, vocab] at every position of a prompt."""
    n, positions = len(tokens), torch.arange(len(tokens))
    n_pages = -(-n // PAGE)
    batch = Batch(
        torch.tensor(tokens), positions, positions + PAGE, torch.ones(n, dtype=torch.bool), torch.tensor([0, n]),
        torch.tensor([n]), torch.arange(1, n_pages + 1)[None], positions, PAGE,
    )  # fmt: skip
    pages = allocate_pages(model.config, n_pages + 1, PAGE, torch.float32, CPU)
    return model.logits(model.forward(batch, pages))


def text(path: Path | None) -> str:
    """The fixed text, or a file's."""
    return "\n\n".join(topics[name] for name in sorted(topics)) if path is None else path.read_text(encoding="utf-8")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--ways", nargs="+", choices=WAYS[1:], default=WAYS[1:])
    parser.add_argument("--kernels", choices=["auto", "reference", "cpu"], default="auto")
    parser.add_argument("--text", type=Path, help="a UTF-8 file instead of Python's documentation")
    parser.add_argument("--windows", type=int, default=8, help="of the text, read one by one")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window; the first 64 are not counted")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    content = text(options.text)
    checkpoint = open_model(options.model)
    tokens = list(checkpoint.text.encode(content[: 16 * options.windows * options.length]).ids)
    models = {way: model(checkpoint, way, options.kernels, options.length) for way in ("float32", *options.ways)}
    tallies = {way: Tally(name if way in ("int8", "int4", AS_IS) else way) for way, (_, name) in models.items()}
    for window in range(options.windows):
        part = tokens[window * options.length : (window + 1) * options.length + 1]
        following = torch.tensor(part[65:])
        exact = logits(models["float32"][0], part[:-1])[64:]
        for way, tally in tallies.items():
            found = exact if way == "float32" else logits(models[way][0], part[:-1])[64:]
            tally.add(found, exact, following)
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    records = [tally.record() for tally in tallies.values()]
    kernels = models["float32"][0].kernels.name
    if options.json:
        print(json.dumps({"model": options.model, "kernels": kernels, "text": digest, "records": records}))
        return
    print(f"{options.model}, {kernels} kernels, text {digest}, {records[0]['tokens']} tokens counted")
    print("perplexity  agreement  divergence")
    for r in records:
        print(f"{r['perplexity']:10.3f}  {r['top1_agreement']:8.2%}  {r['divergence']:10.5f}  {r['way']}")


if __name__ == "__main__":
    main()
