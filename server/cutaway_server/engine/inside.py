"""What captures and edits have cost: plain numbers, written by the engine's thread after a step that had any."""

from __future__ import annotations

from dataclasses import dataclass, field

from cutaway_server.captures import Captured
from cutaway_server.model.probed import Probe

CAPTURES, EDITS, BOTH = WHAT = ("captures", "edits", "both")


@dataclass(slots=True)
class Inside:
    """Counts steps with a probe. Every number only grows; a step without one costs nothing."""

    steps: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WHAT, 0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(WHAT, 0.0))  # of those steps
    rows: int = 0  # that captures read; each once for every capture that reads it
    bytes: int = 0  # of the tensors handed on
    handing: float = 0.0  # seconds to reduce what was kept, and to bring it to the host

    def handed(self, captured: Captured) -> None:
        """A request is told of what was captured."""
        self.bytes += sum(part.data.nbytes for part in captured.parts)

    def step(self, probe: Probe, seconds: float) -> None:
        """A step with a probe is over, and took so long."""
        looks = [look for group in probe.recorder.groups for look in group.looks]
        what = EDITS if not looks else BOTH if probe.editor.layers else CAPTURES
        self.steps[what] += 1
        self.seconds[what] += seconds
        self.rows += sum(len(look.rows) for look in looks)
