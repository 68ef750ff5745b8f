"""What the next step computes. Prefill and decode are one thing: tokens not computed yet. No torch."""

from cutaway_server.scheduler.scheduler import Scheduler
from cutaway_server.scheduler.sequence import Schedule, Sequence, Work

__all__ = ["Schedule", "Scheduler", "Sequence", "Work"]
