"""A step's tensors are those that a plain loop over rows lays out, whatever happened to the sequences before."""

from __future__ import annotations

import random

import torch
from cutaway_server.engine.batch import BatchBuilder, BlockTables
from cutaway_server.request import Request, SamplingParams
from cutaway_server.scheduler import Sequence, Work
from hypothesis import given, settings
from hypothesis import strategies as st

PAGE, CONTEXT, SEQUENCES = 4, 40, 5


def sequence_of(length: int, blocks: list[int]) -> Sequence:
    request = Request("r", tuple(range(length)), SamplingParams(seed=0, max_tokens=9), 0.0)
    return Sequence(request, 0, (0, 0), list(range(100, 100 + length)), blocks=blocks)


def builder() -> BatchBuilder:
    return BatchBuilder(
        max_rows=64, max_sequences=SEQUENCES, max_blocks=CONTEXT // PAGE, page_size=PAGE, device=torch.device("cpu")
    )


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_a_batch_is_what_a_loop_over_its_rows_makes(data: st.DataObject) -> None:
    made = builder()
    for _ in range(3):
        work, wanted = [], []
        for b in range(data.draw(st.integers(1, SEQUENCES))):
            length = data.draw(st.integers(1, CONTEXT))
            start = data.draw(st.integers(max(0, length - 12), length - 1))
            stop = data.draw(st.integers(start + 1, length))
            sequence = sequence_of(length, [1 + 20 * b + i for i in range(-(-length // PAGE))])
            work.append(Work(sequence, start, stop, data.draw(st.integers(start, length))))
            wanted.append(data.draw(st.integers(0, stop - start)))
        batch = made.build(work, wanted)
        rows = [(b, item, position) for b, item in enumerate(work) for position in range(item.start, item.stop)]
        pages = [item.sequence.blocks[position // PAGE] for _, item, position in rows]
        stored = [position >= item.stored for _, item, position in rows]
        assert batch.token_ids.tolist() == [item.sequence.tokens[position] for _, item, position in rows]
        assert batch.positions.tolist() == [position for *_, position in rows]
        assert batch.store.tolist() == stored
        assert batch.slots.tolist() == [
            page * PAGE + position % PAGE if keep else 0
            for (*_, position), page, keep in zip(rows, pages, stored, strict=True)
        ]
        counts = [item.stop - item.start for item in work]
        starts = [sum(counts[:b]) for b in range(len(work) + 1)]
        assert batch.query_starts.tolist() == starts
        assert batch.lengths.tolist() == [max(item.stored, item.stop) for item in work]
        assert batch.logit_rows.tolist() == [
            row for b, n in enumerate(wanted) for row in range(starts[b + 1] - n, starts[b + 1])
        ]


def test_tables_follow_sequences_that_grow_change_and_make_way_for_others() -> None:
    source = random.Random(0)
    tables, out = BlockTables(SEQUENCES, 10), torch.zeros(SEQUENCES, 10, dtype=torch.int64).numpy()
    sequences = [sequence_of(1, [source.randrange(1, 99)]) for _ in range(12)]
    for _ in range(500):
        for sequence in source.sample(sequences, 4):
            change = source.random()
            if change < 0.6 and len(sequence.blocks) < 10:
                sequence.blocks.append(source.randrange(1, 99))
            elif change < 0.8:  # a copy of a shared block takes its place
                sequence.blocks = [*sequence.blocks[:-1], source.randrange(1, 99)]
            elif change < 0.9:  # preempted, and placed again
                sequence.blocks = [source.randrange(1, 99) for _ in range(source.randrange(1, 10))]
        chosen = source.sample(sequences, source.randrange(1, SEQUENCES + 1))
        table = tables.gather(chosen, out)
        longest = max(len(sequence.blocks) for sequence in chosen)
        assert table.tolist() == [s.blocks + [0] * (longest - len(s.blocks)) for s in chosen]
