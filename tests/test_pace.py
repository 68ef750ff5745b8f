"""A long prompt beside running completions makes them wait a little, never long, and is itself not starved."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from cutaway_server.scheduler.pace import LEAST_ROWS, Pace
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scheduler import request_for, scheduler_with


@dataclass
class Machine:
    """A machine whose steps last `fixed + rows * per_row` seconds, and a scheduler that is told so."""

    fixed: float
    per_row: float
    now: float = 0.0

    def __post_init__(self) -> None:
        self.scheduler = scheduler_with(
            capacity=4000, page_size=16, max_batch_tokens=512, max_running=64, prefix_caching=False, max_stretch=2.0
        )
        self.lasted: list[float] = []  # seconds of each step
        self.rows: list[int] = []

    def step(self) -> set[str]:
        """One step: who got a token."""
        schedule = self.scheduler.schedule(self.now)
        rows = schedule.decodes + schedule.prompt_rows
        lasted = self.fixed + rows * self.per_row
        sampling = [work.sequence for work in schedule.work if work.samples]
        self.scheduler.complete(schedule)
        for sequence in sampling:
            self.scheduler.append(sequence, 1)
        self.scheduler.pace.note(schedule.decodes, schedule.prompt_rows, lasted)
        self.now += lasted
        self.lasted.append(lasted)
        self.rows.append(rows)
        return {sequence.request.request_id for sequence in sampling}

    def first_token(self, prompt: int) -> float:
        """Seconds to the first token of a prompt that comes now."""
        begun = self.now
        self.scheduler.add(request_for([1] * prompt, 1000, name="late"))
        while "late" not in self.step():
            pass
        return self.now - begun


@given(st.floats(0.002, 0.1), st.floats(1e-5, 2e-3), st.integers(1, 48))
@settings(deadline=None, max_examples=60)
def test_a_long_prompt_stretches_steps_by_the_factor_and_no_more(fixed: float, per_row: float, streams: int) -> None:
    machine = Machine(fixed, per_row)
    for i in range(streams):
        machine.scheduler.add(request_for([1] * 20, 1000, name=f"r{i}"))
    for _ in range(60):
        machine.step()
    undisturbed = fixed + streams * per_row
    assert machine.lasted[-1] == pytest.approx(undisturbed)
    machine.lasted.clear()
    machine.first_token(3000)
    allowed = max(2.0 * undisturbed, undisturbed + LEAST_ROWS * per_row)
    assert sorted(machine.lasted)[len(machine.lasted) * 95 // 100 - 1] <= 1.15 * allowed


def test_the_prompt_itself_waits_no_more_than_three_times_as_long() -> None:
    alone, beside = Machine(0.009, 0.0003), Machine(0.009, 0.0003)
    for machine, streams in ((alone, 1), (beside, 8)):
        for i in range(streams):
            machine.scheduler.add(request_for([1] * 128, 80, name=f"r{i}"))
        for _ in range(40):
            machine.step()
    for sequence in list(alone.scheduler.running):
        alone.scheduler.finish(sequence)
    assert beside.first_token(1500) <= 3.0 * alone.first_token(1500)


def test_when_more_wait_than_run_prompts_get_the_whole_step() -> None:
    machine = Machine(0.009, 0.0003)
    for i in range(2):
        machine.scheduler.add(request_for([1] * 20, 1000, name=f"r{i}"))
    for _ in range(20):
        machine.step()
    for i in range(62):
        machine.scheduler.add(request_for([1] * 200, 1000, name=f"w{i}"))
    machine.step()
    assert machine.rows[-1] == 512


def test_nothing_is_held_back_while_nothing_runs() -> None:
    machine = Machine(0.009, 0.0003)
    machine.first_token(20)
    for sequence in list(machine.scheduler.running):
        machine.scheduler.finish(sequence)
    machine.rows.clear()
    machine.first_token(1500)
    assert machine.rows[:3] == [512, 512, 476]


@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(0, 512), st.floats(1e-9, 100.0)), max_size=50),
    st.integers(1, 64),
)
@settings(deadline=None)
def test_prompts_always_go_on_whatever_the_clock_said(steps: list[tuple[int, int, float]], decodes: int) -> None:
    pace = Pace(2.0)
    for rows, prompt_rows, seconds in steps:
        pace.note(rows, prompt_rows, seconds)
    assert LEAST_ROWS <= pace.prompt_rows(decodes, 1, 400) <= 400


def test_one_hiccup_is_forgotten() -> None:
    pace = Pace(2.0)
    for _ in range(50):
        pace.note(8, 0, 0.012)
        pace.note(8, 32, 0.022)
    before = pace.prompt_rows(8, 1, 512)
    pace.note(8, 32, 30.0)
    for _ in range(30):
        pace.note(8, 0, 0.012)
        pace.note(8, 32, 0.022)
    assert pace.prompt_rows(8, 1, 512) == pytest.approx(before, rel=0.15)
