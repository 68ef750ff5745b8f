"""The state of the machine as messages: what is another tenant's is counted, and tokens get their text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from cutaway.v1 import inference_pb2 as inference
from cutaway.v1 import machine_pb2 as v1

from cutaway_server.cache.events import BlockChange, BlockEvent, Owner
from cutaway_server.engine.machine import (
    BlockState,
    CacheState,
    CompletionState,
    Ledger,
    RequestsState,
    RequestState,
    blocks_of,
)  # fmt: skip
from cutaway_server.engine.observed import PHASES
from cutaway_server.engine.watched import StepReport
from cutaway_server.request import FinishReason

BLOCKS_AT_ONCE = 4096

Spell = Callable[[Sequence[int]], str]  # tokens to text; to nothing where it may not be told

CHANGES = {change: v1.BlockChange.Value(f"BLOCK_CHANGE_{change.name}") for change in BlockChange}
REASONS = {
    FinishReason.STOP.value: inference.FINISH_REASON_STOP,
    FinishReason.LENGTH.value: inference.FINISH_REASON_LENGTH,
    FinishReason.ABORT.value: inference.FINISH_REASON_ABORT,
}


def own_name(name: str) -> str:
    """A request's name as its tenant knows it."""
    return name.rpartition("/")[2]


def stats_of(state: CacheState, dtype: str) -> v1.GetCacheStatsResponse:
    """The pool in numbers."""
    return v1.GetCacheStatsResponse(
        blocks_total=state.total, blocks_used=state.used, blocks_cached=state.cached, blocks_free=state.free,
        blocks_retained=state.retained, page_size=state.page_size, block_bytes=state.block_bytes,
        fragmentation=_fragmentation(state), prefix_queried_tokens=state.queried_tokens,
        prefix_hit_tokens=state.hit_tokens, evictions=state.evictions, preemptions=state.preemptions,
        requests_retained=state.runs, own_blocks_used=state.own_used, own_blocks_cached=state.own_cached,
        prefix_caching=state.prefix_caching, dtype=dtype,
    )  # fmt: skip


def _fragmentation(state: CacheState) -> float:
    return min(1.0, state.empty_positions / (state.used * state.page_size)) if state.used else 0.0


def blocks_messages(ledger: Ledger, dtype: str, request_id: str, spell: Spell) -> Iterator[v1.GetBlocksResponse]:
    """The tenant's blocks, of one request if it is named, in messages that any client takes."""
    found = [b for b in blocks_of(ledger) if not request_id or _concerns(b, request_id)]
    stats = stats_of(ledger.state, dtype)
    for start in range(0, max(1, len(found)), BLOCKS_AT_ONCE):
        part = [_block(block, spell) for block in found[start : start + BLOCKS_AT_ONCE]]
        yield v1.GetBlocksResponse(stats=None if start else stats, blocks=part)


def _concerns(block: BlockState, request_id: str) -> bool:
    return any(own_name(holder.owner.request_id) == request_id for holder in block.holders)


def _block(block: BlockState, spell: Spell) -> v1.Block:
    tokens = max((holder.tokens for holder in block.holders), key=len, default=())
    return v1.Block(
        block=block.block, use=v1.BlockUse.Value(f"BLOCK_USE_{block.use.name}"), references=block.references,
        filled=block.filled, hash=block.digest, made_by=own_name(block.maker.request_id), age_seconds=block.age,
        idle_seconds=block.idle, tokens=tokens, text=spell(tokens),
        holders=[
            v1.BlockHolder(request_id=own_name(h.owner.request_id), index=h.owner.index, position=h.start)
            for h in block.holders
        ],
    )  # fmt: skip


def events_of(events: Iterable[BlockEvent], tenant: str) -> v1.WatchCacheResponse:
    """What happened to blocks."""
    told = v1.WatchCacheResponse()
    for event in events:
        if event.owner.tenant != tenant:
            told.other_events += 1
            continue
        told.events.add(
            change=CHANGES[event.change],
            block=event.block, request_id=own_name(event.owner.request_id), index=event.owner.index,
            references=event.references, hash=event.digest, source=event.source,
        )  # fmt: skip
    return told


def steps_of(reports: Iterable[StepReport], tenant: str, spell: Spell, *, tokens: bool) -> v1.WatchStepsResponse:
    """Steps, as `tenant` may see them."""
    return v1.WatchStepsResponse(steps=[_step(report, tenant, spell, tokens) for report in reports])


def _step(report: StepReport, tenant: str, spell: Spell, tokens: bool) -> v1.Step:
    step = v1.Step(
        step=report.step, time=report.time, copies=report.copies, running=report.running, waiting=report.waiting,
        blocks_used=report.used, blocks_cached=report.cached,
        phases=[v1.PhaseTime(phase=p, seconds=s) for p, s in zip(PHASES, report.seconds, strict=False)],
    )  # fmt: skip
    cached = dict(report.started)
    for row in report.rows:
        if row.owner.tenant != tenant:
            step.other_completions += 1
            step.other_rows += row.stop - row.start
            continue
        step.rows.add(
            request_id=own_name(row.owner.request_id), index=row.owner.index, start=row.start, stop=row.stop,
            revisited=row.revisited, cached_tokens=cached.get(row.owner), tokens=row.tokens, text=spell(row.tokens),
        )  # fmt: skip
    for new in report.sampled:
        if new.owner.tenant == tenant:
            step.sampled.add(
                request_id=own_name(new.owner.request_id), index=new.owner.index, step=new.step,
                token=new.token if tokens else None, text=spell((new.token,)),
            )  # fmt: skip
    step.preempted.extend(_name(owner) for owner in report.preempted if owner.tenant == tenant)
    return step


def _name(owner: Owner) -> v1.CompletionName:
    return v1.CompletionName(request_id=own_name(owner.request_id), index=owner.index)


def requests_message(state: RequestsState, spell: Spell) -> v1.ListRequestsResponse:
    """A tenant's requests."""
    finished = sum(1 for request in state.requests if request.since_end is not None)
    return v1.ListRequestsResponse(
        requests=[_request(request, spell) for request in state.requests],
        other_requests=state.live - (len(state.requests) - finished), other_retained=state.finished - finished,
        running=state.running, waiting=state.waiting,
    )  # fmt: skip


def _request(request: RequestState, spell: Spell) -> v1.RequestInfo:
    return v1.RequestInfo(
        request_id=own_name(request.request_id), stage=v1.RequestStage.Value(f"REQUEST_STAGE_{request.stage.name}"),
        n=request.n, prompt_tokens=request.prompt_tokens, cached_tokens=request.cached_tokens,
        computed_tokens=request.computed_tokens, max_tokens=request.max_tokens, preemptions=request.preemptions,
        age_seconds=request.age, ended_seconds=request.since_end, ahead=request.ahead, prompt=spell(request.prompt),
        completions=[_completion(completion, spell) for completion in request.completions],
    )  # fmt: skip


def _completion(completion: CompletionState, spell: Spell) -> v1.CompletionInfo:
    reason = REASONS.get(completion.ended, inference.FINISH_REASON_UNSPECIFIED)
    return v1.CompletionInfo(
        index=completion.index, generated_tokens=completion.generated, stored=completion.stored,
        blocks=completion.blocks, finish_reason=reason, tokens=completion.tokens,
        text=spell(completion.tokens),
    )  # fmt: skip
