"""Which sequences run, with which blocks, and which rows of them the next step computes.

Whose turn it is, `shares.py` says: within a tenant and a priority that is age, and nobody overtakes. `running` and
`waiting` are each in order of priority, then age. In each step

1.  what is past its deadline ends;
2.  each running sequence gets the blocks it will write, if need be by preempting those whose turn is last;
3.  if somebody could not be admitted in the last step, those who must make way (`displacing.py`) are preempted;
4.  decodes, which need one row each, get it: no prompt stalls them; where there are any, prompts get no more of the
    token budget than `pace.py` finds fair;
5.  the prompt whose turn is first gets the rest of the token budget, but for a quarter that other prompts may take and
    waiting sequences may be admitted with, so that a short question does not wait for a long one to be read;
6.  who is admitted gets blocks for all its tokens at once, so that no prompt that has begun waits for blocks in its
    middle. None are admitted in a step that preempts.

A step costs time proportional to what runs, not to how long contexts are.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from math import inf

from cutaway_server.cache.blocks import BlockPool
from cutaway_server.errors import InvalidField, QueueFull
from cutaway_server.request import Request
from cutaway_server.scheduler.displacing import displaced
from cutaway_server.scheduler.invariants import check_ownership
from cutaway_server.scheduler.pace import Pace
from cutaway_server.scheduler.prefix import PrefixCache
from cutaway_server.scheduler.schedule import Draft, Schedule
from cutaway_server.scheduler.sequence import Sequence
from cutaway_server.scheduler.shares import Shares

RETRY_AFTER_SECONDS = 1.0
OTHERS_SHARE = 4  # one part in so many of what decodes leave is for other prompts than the first
CREDIT_STEPS = 8  # a tenant falls behind others by at most so many whole steps


class Scheduler:
    """Turns requests into steps. The engine calls `schedule`, computes, then `complete` and `append` or `finish`."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_batch_tokens: int,
        max_running: int,
        max_queued: int,
        max_context: int,
        prefix_caching: bool = True,
        max_stretch: float = 1.8,
    ) -> None:
        assert min(max_batch_tokens, max_running, max_queued, max_context) >= 1
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.max_running = max_running  # completions, so a request for n of them counts n times
        self.max_queued = max_queued
        self.max_context = max_context
        self.pace = Pace(max_stretch)
        self._prefix = PrefixCache(pool, enabled=prefix_caching)
        self._shares = Shares(credit=CREDIT_STEPS * max_batch_tokens)
        self.running: list[Sequence] = []  # by priority, oldest first
        self.waiting: list[Sequence] = []  # by priority, oldest first
        self._arrivals = 0
        self._timed: dict[Sequence, float] = {}  # the deadlines of unfinished sequences
        self._earliest = inf  # at most the earliest of them
        self._stalled: tuple[Sequence, int] | None = None  # who did not fit, into how many blocks
        self._refused: Sequence | None = None  # who had the next turn in the last step, and found no room

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.running or self.waiting)

    @property
    def n_running(self) -> int:
        """Number of completions that hold blocks, or are kept a place beside their prompt."""
        return sum(sequence.slots for sequence in self.running)

    @property
    def n_waiting(self) -> int:
        """Number of sequences that wait, new or preempted."""
        return len(self.waiting)

    @property
    def settled(self) -> bool:
        """Whether the next step is sure to admit nobody, and to preempt nobody for one who waits."""
        return not self.waiting or (self.n_running >= self.max_running and not self._shares.contended)

    @property
    def caches_prefixes(self) -> bool:
        """Whether prompts that begin alike share blocks."""
        return self._prefix.enabled

    def looks_up(self, request: Request) -> bool:
        """Whether the prompt of `request` is looked for in the prefix cache."""
        return self._prefix.serves(request)

    def add(self, request: Request) -> Sequence:
        """Queue `request` as one sequence, to be forked into `sampling.n` when its prompt is computed.

        Raises:
            InvalidField: it can never run here.
            QueueFull: too many wait.
        """
        self.refuse(request)
        order = (-request.priority, self._arrivals, 0)
        sequence = Sequence(request, 0, order, list(request.prompt), slots=_slots(request))
        self._arrivals += 1
        _enter(self.waiting, sequence)
        self._shares.arrive(sequence)
        self._time(sequence)
        return sequence

    def refuse(self, request: Request, arriving: int = 0) -> None:
        """Raise what `add` would. `arriving` requests are on their way and count as waiting. Safe from any thread.

        Requests that a free place is there for do not wait, though it takes a step to place them. A tenant may have at
        most as many waiting as may then still wait of others.

        Raises:
            InvalidField: it can never run here.
            QueueFull: too many wait.
        """
        self._refuse_impossible(request)
        waiting = len(self.waiting) + arriving
        left = self.max_queued - waiting + max(0, self.max_running - self.n_running)
        if left <= 0:
            raise QueueFull(f"{waiting} requests are waiting, and no more may", RETRY_AFTER_SECONDS)
        if request.tenant and 2 * left <= self.max_queued:
            own = sum(sequence.request.tenant == request.tenant for sequence in self.waiting.copy())
            if own >= left:
                rule = f"{own} of your requests are waiting, and what is left of the queue is for others"
                raise QueueFull(rule, RETRY_AFTER_SECONDS)

    def _refuse_impossible(self, request: Request) -> None:
        prompt, sampling = len(request.prompt), request.sampling
        if not 1 <= prompt <= self.max_context:
            raise InvalidField("prompt", f"{prompt} tokens", f"must have 1 to {self.max_context} tokens")
        if _slots(request) > self.max_running:
            raise InvalidField("sampling.n", sampling.n, f"at most {self.max_running} completions run at once")
        need = self._pages(prompt + min(1, sampling.max_tokens))
        if need > self.pool.capacity:
            rule = (
                f"the prompt and a first token need {need} blocks of {self.pool.page_size} tokens, "
                f"and the whole cache has {self.pool.capacity}"
            )
            raise InvalidField("prompt", f"{prompt} tokens", rule)

    def schedule(self, now: float) -> Schedule:
        """Decide the next step and take the blocks it needs. `now` is compared to deadlines."""
        self.pool.statistics.now = now
        draft = Draft(self.max_batch_tokens)
        self._expire(now, draft)
        self._reserve(draft)
        self._displace(draft)
        prompts = []
        for sequence in self.running:
            if sequence.pending > 1:
                prompts.append(sequence)
            else:
                self._give_rows(sequence, draft)
        draft.decodes = len(draft.work)
        draft.budget = self.pace.prompt_rows(draft.decodes, len(prompts) + len(self.waiting), draft.budget)
        self._read(deque(self._shares.ranked(prompts)), draft)
        return draft.freeze()

    def complete(self, schedule: Schedule) -> None:
        """Take note that the rows of `schedule` were computed, and publish the blocks they filled."""
        for work in schedule.work:
            sequence = work.sequence
            if sequence.finished:
                continue
            assert sequence.next == work.start, "a schedule is completed once, before the next is made"
            assert not sequence.promised, "nobody knows what was computed"
            sequence.told = max(sequence.told, work.stop)
            if work.start < sequence.prompt_length:
                sequence.scored = max(sequence.scored, min(work.stop, sequence.prompt_length))
            if work.stop > work.stored:
                sequence.stored = work.stop
                self._prefix.publish(sequence, work.stored // self.pool.page_size)
            sequence.next = work.stop
            if work.stop < sequence.stored:
                sequence.next = sequence.wanted_from(work.stop)

    def append(self, sequence: Sequence, token: int) -> None:
        """Commit a sampled token, to be computed next, or make known the one that was promised."""
        assert not sequence.finished
        if sequence.promised:
            sequence.tokens[-1] = token
            sequence.promised = False
            return
        assert sequence.pending == 0, "a token is sampled when all before it are computed"
        sequence.tokens.append(token)

    def promise(self, sequence: Sequence) -> None:
        """Take the place of a token that is being drawn, so that the step after can be scheduled before it is known.

        `append` makes it known. Until then no step that reads it may be completed: its blocks would be published.
        """
        self.append(sequence, 0)
        sequence.promised = True

    def fork(self, sequence: Sequence, index: int) -> Sequence:
        """Start completion `index` where `sequence` stands: all computed, nothing appended. They share all blocks.

        A shared block is copied when one of its owners is about to write into it.
        """
        assert not sequence.finished
        assert sequence.pending == 0, "a sequence is forked when its prompt is computed"
        assert sequence.slots > 1, "a request has at most n completions"
        twin = Sequence(
            sequence.request,
            index,
            (*sequence.order[:2], index),
            list(sequence.tokens),
            blocks=list(sequence.blocks),
            stored=sequence.stored,
            next=sequence.next,
            scored=sequence.scored,
            told=sequence.told,
            digests=list(sequence.digests),
        )
        for block in twin.blocks:
            self.pool.share(block, twin.owner)
        sequence.slots -= 1
        _enter(self.running, twin)
        self._shares.arrive(twin)
        self._time(twin)
        return twin

    def finish(self, sequence: Sequence) -> None:
        """End `sequence` and give its blocks back, whatever state it is in. Ending it twice is the same as once."""
        if sequence.finished:
            return
        sequence.finished = True
        (self.running if sequence.blocks else self.waiting).remove(sequence)
        self._timed.pop(sequence, None)
        self._shares.leave(sequence)
        self._give_back(sequence)

    def check(self) -> None:
        """Assert every invariant, in time proportional to all there is."""
        check_ownership(self.pool, self.running, self.waiting)
        assert self.n_running <= self.max_running

    def _pages(self, length: int) -> int:
        return -(-length // self.pool.page_size)

    def _time(self, sequence: Sequence) -> None:
        if sequence.request.deadline is not None:
            self._timed[sequence] = sequence.request.deadline
            self._earliest = min(self._earliest, sequence.request.deadline)

    def _expire(self, now: float, draft: Draft) -> None:
        if now <= self._earliest:
            return
        draft.expired += [sequence for sequence, deadline in self._timed.items() if deadline < now]
        for sequence in draft.expired:
            self.finish(sequence)
        self._earliest = min(self._timed.values(), default=inf)

    def _reserve(self, draft: Draft) -> None:
        """Give each running sequence the blocks it will write. Only the last lose theirs, who had no turn yet."""
        line, turn = self._shares.ranked(self.running), 0
        while turn < len(line):
            sequence = line[turn]
            if not self._missing(sequence):
                turn += 1
            elif self._make_room(sequence, line, draft):
                self._grow(sequence, draft)
                turn += 1

    def _make_room(self, sequence: Sequence, line: list[Sequence], draft: Draft) -> bool:
        """Preempt from the end of `line` until `sequence` can grow. False if that took `sequence` itself."""
        while self._missing(sequence) > self.pool.available:
            last = line.pop()
            if not line:
                self.finish(last)
                draft.exhausted.append(last)
                return False
            self._preempt(last, draft)
            if last is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence, draft: Draft) -> None:
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.preemptions += 1
        _enter(self.waiting, sequence)
        draft.preempted.append(sequence)

    def _displace(self, draft: Draft) -> None:
        """Preempt those who must make way for who was refused a place; it is admitted in a later step."""
        refused, self._refused = self._refused, None
        if refused is None or refused.finished or draft.preempted or not self._shares.contended:
            return
        for sequence in displaced(refused, self.running, self.max_running, self.pool, self._shares):
            self._preempt(sequence, draft)

    def _missing(self, sequence: Sequence) -> int:
        """Blocks to take before its next rows are stored."""
        grown = self._pages(len(sequence.tokens)) - len(sequence.blocks)
        return grown + 1 if sequence.request.sampling.n > 1 and self._writes_shared(sequence) else grown

    def _writes_shared(self, sequence: Sequence) -> bool:
        """Whether the block of the next position to store is someone else's too: only forks share a partial block."""
        tail = sequence.stored // self.pool.page_size
        writes = sequence.stored < len(sequence.tokens) and tail < len(sequence.blocks)
        return writes and self.pool.references(sequence.blocks[tail]) > 1

    def _grow(self, sequence: Sequence, draft: Draft) -> None:
        if self._writes_shared(sequence):
            tail = sequence.stored // self.pool.page_size
            shared = sequence.blocks[tail]
            own = self.pool.take(sequence.owner, copy_of=shared)
            sequence.blocks = [*sequence.blocks[:tail], own, *sequence.blocks[tail + 1 :]]
            self.pool.release(shared, sequence.owner)
            draft.copies.append((shared, own))
        for _ in range(self._pages(len(sequence.tokens)) - len(sequence.blocks)):
            sequence.blocks.append(self.pool.take(sequence.owner))

    def _read(self, prompts: deque[Sequence], draft: Draft) -> None:
        """Give the rest of the budget to `prompts`, which run, and to those who are admitted, whose turn is first."""
        if not prompts:
            self._admit(draft)
            return
        self._admit(draft, before=prompts[0])
        first = prompts.popleft()
        kept = min(first.pending, draft.budget - draft.budget // OTHERS_SHARE)
        draft.budget -= kept
        for sequence in prompts:
            self._give_rows(sequence, draft)
        self._admit(draft)
        draft.budget += kept
        self._give_rows(first, draft)

    def _admit(self, draft: Draft, before: Sequence | None = None) -> None:
        """Admit those whose turn is next, and comes before that of `before`, for as long as there is room."""
        if not self.waiting or draft.preempted or self._refused is not None:
            return
        free = self.max_running - self.n_running
        while draft.budget and self.waiting:
            sequence = self._shares.first(self.waiting)
            if before is not None and self._shares.turn(before) < self._shares.turn(sequence):
                return
            if sequence.slots > free or not self._place(sequence):
                self._refused = sequence
                return
            self.waiting.remove(sequence)
            _enter(self.running, sequence)
            free -= sequence.slots
            if not sequence.preemptions:
                draft.started.append((sequence, sequence.stored))
            self._give_rows(sequence, draft)

    def _give_rows(self, sequence: Sequence, draft: Draft) -> None:
        self._shares.charge(sequence, draft.give_rows(sequence))

    def _place(self, sequence: Sequence) -> bool:
        """Give a waiting sequence blocks for all its tokens, shared where they are cached. False if too few are left.

        While others run, one block for each completion stays free, lest the newcomer be preempted at once.
        """
        available = self.pool.available
        if self.running and self._stalled is not None:  # don't look the same whole prompt up in every step
            stalled, had = self._stalled
            if stalled is sequence and available <= had:
                return False
        found = self._prefix.find(sequence)
        fresh = self._pages(len(sequence.tokens)) - len(found)
        revived = sum(self.pool.references(block) == 0 for block in found)
        spare = self.n_running + sequence.slots - 1 if self.running else 0
        if fresh + revived + spare > available:
            self._stalled = (sequence, available)
            return False
        for block in found:
            self.pool.share(block, sequence.owner)
        sequence.blocks = found + [self.pool.take(sequence.owner) for _ in range(fresh)]
        sequence.stored = len(found) * self.pool.page_size
        sequence.next = sequence.wanted_from(0)
        return True

    def _give_back(self, sequence: Sequence) -> None:
        for block in reversed(sequence.blocks):  # the tail is evicted before the head, which more can share
            self.pool.release(block, sequence.owner)
        sequence.blocks = []
        sequence.stored = sequence.next = 0


def _enter(line: list[Sequence], sequence: Sequence) -> None:
    """Put `sequence` in its place; most come last."""
    if not line or line[-1].order < sequence.order:
        line.append(sequence)
    else:
        insort(line, sequence, key=lambda other: other.order)


def _slots(request: Request) -> int:
    """Completions that will run at the same time: a prompt that is only scored is never forked."""
    return request.sampling.n if request.sampling.max_tokens else 1
