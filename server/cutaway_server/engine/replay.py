"""The sampling of a token that was generated, done again: its logits are computed anew from the pages.

One row is computed between two steps, of the position before the token: it reads the pages, stores nothing, and is no
step. A row's bits depend on the tokens before it alone, so that the logits are those that were sampled from.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cutaway_server.engine.engine import Engine
from cutaway_server.engine.looking import marked_of
from cutaway_server.engine.stored import blocks_of, find, gone
from cutaway_server.errors import InvalidField
from cutaway_server.kernels.batch import Batch
from cutaway_server.model.probed import Probe
from cutaway_server.probe.editor import Editor
from cutaway_server.probe.recorder import Recorder
from cutaway_server.request import Request, SamplingParams
from cutaway_server.sampler import Followed, SamplerState, build_batch, follow, masks
from cutaway_server.scheduler import Schedule, Sequence, Work


@dataclass(frozen=True, slots=True)
class Written:
    """A generated token: the one at `position`, which is the last of `tokens` [position + 1]."""

    request: Request
    index: int
    tokens: tuple[int, ...]
    live: bool

    @property
    def position(self) -> int:
        """Its position, counted from the prompt's start."""
        return len(self.tokens) - 1

    @property
    def token(self) -> int:
        """What was generated."""
        return self.tokens[-1]

    @property
    def override(self) -> int | None:
        """The token that the request wanted here, whatever is sampled."""
        return dict(self.request.edits.overrides).get(self.position - len(self.request.prompt))


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to sample: the parameters and past of the completion, and the one token that may come (None: any)."""

    state: SamplerState
    forced: int | None = None


def find_written(engine: Engine, name: str, index: int, position: int) -> Written:
    """The token at `position` of completion `index` of a request; below 0 counted from the end of what there is.

    Raises:
        NotFound: no such request, or completion.
        InvalidField: no token was generated there (yet).
    """
    request, found = find(engine, name, index)
    live = isinstance(found, Sequence)
    known = found.tokens[:-1] if isinstance(found, Sequence) and found.promised else found.tokens
    place, prompt = (position + len(known) if position < 0 else position), len(request.prompt)
    if not prompt <= place < len(known):
        made = f"{prompt} to {len(known) - 1}" if len(known) > prompt else "none yet"
        raise InvalidField("position", position, f"must be that of a generated token, which are {made}")
    return Written(request, index, tuple(known[: place + 1]), live)


def plan_of(written: Written, sampling: SamplingParams, vocab_size: int, *, forced: int | None = None) -> Plan:
    """How the token would be sampled with these parameters. From any thread."""
    asked, prompt = replace(sampling, logprobs=None), written.request.prompt
    state = SamplerState(asked, prompt, vocab_size, written.index)
    for token in written.tokens[len(prompt) : -1]:
        state.append(token)
    return Plan(state, forced)


def replay(engine: Engine, written: Written, plans: Items[Plan]) -> list[Followed]:
    """Compute the logits that the token was sampled from, and sample from them as each plan says.

    Raises:
        NotFound: the request has ended meanwhile and is not kept.
        Unsupported: it was preempted, or its blocks have been given to others.
    """
    logits = logits_before(engine, written)
    followed = []
    for plan in plans:
        mask = None if plan.forced is None else masks([plan.forced], logits.shape[1])
        batch = build_batch([plan.state], [written.position], logits.shape[1], logits.device, mask)
        followed.append(follow(logits, batch))
    return followed


def logits_before(engine: Engine, written: Written) -> Tensor:
    """Logits fp32 [1, V] of the position before the token, with the request's edits."""
    request, found = find(engine, written.request.request_id, written.index)
    if request is not written.request:
        raise gone(written.request.request_id)
    blocks = blocks_of(engine, found, range(written.position))
    size = engine.pages.page_size
    used = list(blocks[: -(-written.position // size)])
    batch = _row(written, used, size, engine.builder.device)
    residual = engine.model.forward(batch, engine.pages, probe=_edited(engine, written, used))
    return engine.model.logits(residual)


def _row(written: Written, blocks: list[int], page_size: int, device: torch.device) -> Batch:
    """The position before the token as a batch of one row, which is revisited."""
    at = written.position - 1

    def whole(*numbers: int) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=device)

    return Batch(
        token_ids=whole(written.tokens[at]),
        positions=whole(at),
        slots=whole(0),
        store=torch.zeros(1, dtype=torch.bool, device=device),
        query_starts=whole(0, 1),
        lengths=whole(at + 1),
        block_table=whole(*blocks)[None],
        logit_rows=whole(0),
        page_size=page_size,
    )


def _edited(engine: Engine, written: Written, blocks: list[int]) -> Probe | None:
    """What changes values of the row, as it did when it was computed first."""
    at, request = written.position - 1, written.request
    sequence = Sequence(request, written.index, (0, 0, 0), list(written.tokens), blocks=blocks, stored=at + 1)
    marked = marked_of(Schedule((Work(sequence, at, at + 1, at + 1),)))
    if not marked:
        return None
    device = engine.pages.keys.device
    return Probe(Recorder(engine.model.kernels, [], device, engine.steps), Editor(marked, device))
