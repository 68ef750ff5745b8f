"""Logits to tokens and log-probabilities: pure functions over a whole batch, and what each completion remembers.

choose.py     one step: `sample`
logprobs.py   what the model itself believes: `log_probabilities`
adjust.py     biases, penalties, bans and masks, on the logits
filters.py    top-k, top-p, min-p and typical-p: which tokens may be drawn
order.py      the least and the nearest of a row, with one rule for ties
draw.py       one number in [0, 1) to one token
note.py       who follows a row through all of these is told what each stage leaves
stages.py     one row followed: `follow`
philox.py     that number, from seed, index and position alone
state.py      one completion's parameters and past
build.py      the completions of a step as one `SamplingBatch`

A row's result depends on its own logits and parameters only, to the bit: floating-point sums have a shape that the
vocabulary alone decides, all others are sums of integers, and who takes which path follows from its own parameters.
"""

from cutaway_server.sampler.adjust import masks
from cutaway_server.sampler.batch import SampledBatch, SamplingBatch
from cutaway_server.sampler.build import BatchMaker, build_batch
from cutaway_server.sampler.choose import sample
from cutaway_server.sampler.logprobs import log_probabilities
from cutaway_server.sampler.philox import uniforms
from cutaway_server.sampler.stages import Followed, Stages, follow
from cutaway_server.sampler.state import SamplerState

__all__ = [
    "BatchMaker",
    "Followed",
    "SampledBatch",
    "SamplerState",
    "SamplingBatch",
    "Stages",
    "build_batch",
    "follow",
    "log_probabilities",
    "masks",
    "sample",
    "uniforms",
]
