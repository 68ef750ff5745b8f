"""ReplaySample: what is asked of a token's sampling, and how its stages are told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from cutaway.v1 import inference_pb2
from cutaway.v1 import replay_pb2 as v1

from cutaway_server.engine.build import EngineFacts
from cutaway_server.engine.replay import Plan, Written, plan_of
from cutaway_server.errors import InvalidField, Unsupported
from cutaway_server.request import SamplingOptions, SamplingParams
from cutaway_server.sampler import Followed, Stages
from cutaway_server.service.asking import sampling_of
from cutaway_server.service.generation import Served
from cutaway_server.service.tokens import sampling_options, wire_sampling

USUAL_COUNT = 10
MAX_COUNT = 256
MAX_TOKENS = 256
CHOOSING = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "min_tokens",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked beside the token: other parameters (None: none), and which tokens to tell of."""

    changes: SamplingOptions | None
    count: int
    tokens: tuple[int, ...]


def replay_wanted(request: v1.ReplaySampleRequest, facts: EngineFacts) -> Wanted:
    """What `request` asks, as far as it can be checked without the model's text.

    Raises:
        InvalidField: names the field, the value and the rule.
    """
    count = request.count if request.HasField("count") else USUAL_COUNT
    if count > MAX_COUNT:
        raise InvalidField("count", count, f"must be at most {MAX_COUNT}")
    if len(request.tokens) > MAX_TOKENS:
        raise InvalidField("tokens", f"{len(request.tokens)} entries", f"at most {MAX_TOKENS} are allowed")
    for token in request.tokens:
        if not 0 <= token < facts.config.d_vocab:
            raise InvalidField("tokens", token, f"token ids are in [0, {facts.config.d_vocab})")
    changes = sampling_options(request.sampling) if request.HasField("sampling") else None
    if changes is not None:
        _check_changes(request.sampling)
    return Wanted(changes, count, tuple(request.tokens))


def replay_plans(wanted: Wanted, written: Written, served: Served) -> list[Plan]:
    """How to sample: as the request asked, and, if that is wanted, with other parameters.

    Raises:
        InvalidField: a parameter breaks a rule.
    """
    vocab_size, sampling = served.facts.config.d_vocab, written.request.sampling
    plans = [plan_of(written, sampling, vocab_size, forced=written.override)]
    if wanted.changes is not None:
        plans.append(plan_of(written, _changed(sampling, wanted.changes, written, served), vocab_size))
    return plans


def replay_response(
    wanted: Wanted, written: Written, plans: Sequence[Plan], followed: Sequence[Followed], served: Served
) -> v1.ReplaySampleResponse:
    """The answer.

    Raises:
        Unsupported: with the parameters asked for, no token can be drawn.
    """
    if not all(each.valid for each in followed):
        raise Unsupported("no token can be drawn so: all are banned, or the logits are not finite")
    facts, stages = served.facts, [Stages.of(each) for each in followed]
    named = (*wanted.tokens, written.token, *(each.token for each in stages))
    told = [
        _replay(plan.state.sampling, each, [*each.top(wanted.count), *named], served)
        for plan, each in zip(plans, stages, strict=True)
    ]
    return v1.ReplaySampleResponse(
        position=written.position, prompt_tokens=len(written.request.prompt), token=written.token,
        text=served.text.decode([written.token]), agrees=stages[0].token == written.token,
        overridden=written.override is not None, running=written.live, replay=told[0],
        changed=told[1] if len(told) > 1 else None, cached_positions=written.position, recomputed_positions=1,
        model_hash=facts.model_hash, kernels=facts.kernels, dtype=facts.dtype, quantization=facts.quantization,
        kv_dtype=facts.kv_dtype,
    )  # fmt: skip


def _check_changes(message: inference_pb2.SamplingParams) -> None:
    for field, value in message.ListFields():
        if field.name not in (*CHOOSING, "logit_bias", "bad_words"):
            told = f"{len(value)} entries" if field.is_repeated else value
            rule = "must not be set: the same number is drawn, and only what changes the choice can be"
            raise InvalidField(f"sampling.{field.name}", told, rule)


def _changed(sampling: SamplingParams, changes: SamplingOptions, written: Written, served: Served) -> SamplingParams:
    """The request's parameters with the changes, each under the rules that hold for a request."""
    valid = sampling_of(changes, served.text, served.facts, len(written.request.prompt))
    names = [name for name in CHOOSING if getattr(changes, name) is not None]
    names += [name for name in ("logit_bias", "bad_words") if getattr(changes, name)]
    return replace(sampling, **{name: getattr(valid, name) for name in names})


def _replay(sampling: SamplingParams, stages: Stages, tokens: Iterable[int], served: Served) -> v1.Replay:
    share = stages.share(stages.token)
    return v1.Replay(
        sampling=_in_force(sampling),
        token=stages.token,
        text=served.text.decode([stages.token]),
        rank=stages.rank(stages.token),
        uniform=stages.uniform,
        likeliest_first=stages.likeliest_first,
        lower=None if share is None else share[0],
        upper=None if share is None else share[1],
        filters=[
            v1.ReplayFilter(
                name=each.name, value=getattr(sampling, each.name), kept=int(each.kept.sum()), mass=each.mass
            )
            for each in stages.filters
        ],
        candidates=[_candidate(stages, token, served) for token in dict.fromkeys(tokens)],
        banned=int((stages.adjusted == -np.inf).sum()),
    )


def _in_force(sampling: SamplingParams) -> inference_pb2.SamplingParams:
    options = SamplingOptions(
        **{name: getattr(sampling, name) for name in CHOOSING},
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed,
    )
    return wire_sampling(options)


def _candidate(stages: Stages, token: int, served: Served) -> v1.ReplayCandidate:
    return v1.ReplayCandidate(
        token=token,
        text=served.text.decode([token]),
        rank=stages.rank(token),
        logit=float(stages.logits[token]),
        biased=float(stages.biased[token]),
        penalised=float(stages.penalised[token]),
        scaled=float(stages.scaled[token]),
        probability=float(stages.probabilities[token]),
        final=float(stages.final[token]),
        removed_by=stages.removed_by(token),
    )
