"""What the next step computes. Prefill and decode are one thing: tokens not computed yet. No torch."""

from cutaway_server.scheduler.schedule import Schedule, Work
from cutaway_server.scheduler.scheduler import Scheduler
from cutaway_server.scheduler.sequence import Sequence

__all__ = ["Schedule", "Scheduler", "Sequence", "Work"]
