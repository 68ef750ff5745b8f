"""How long blocks of the KV cache live, lie idle, and come back. Every note takes constant time."""

from __future__ import annotations

from cutaway_server.histogram import Histogram

# vLLM's, so that its dashboards fit, and a day above them.
BLOCK_EDGES = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 7200,
    28_800, 86_400,
)  # fmt: skip


class BlockStatistics:
    """Ages of blocks, in seconds. `now` is the time of the last step: whoever schedules steps sets it."""

    def __init__(self, n_blocks: int) -> None:
        self.now = 0.0
        self.lifetime = Histogram(BLOCK_EDGES)  # from being taken to eviction
        self.idle = Histogram(BLOCK_EDGES)  # from its last release to eviction
        self.reuse_gap = Histogram(BLOCK_EDGES)  # from its last release to being found and shared again
        self.taken = [0.0] * n_blocks  # when each block was last given out
        self.released_at = [0.0] * n_blocks  # when each was last released and kept

    def took(self, block: int) -> None:
        """A block is given out for new contents."""
        self.taken[block] = self.now

    def released(self, block: int) -> None:
        """A block has lost its last reference and is kept for who may ask for its contents."""
        self.released_at[block] = self.now

    def reused(self, block: int) -> None:
        """A block that nobody held is shared again."""
        self.reuse_gap.observe(self.now - self.released_at[block])

    def evicted(self, block: int) -> None:
        """A block that nobody held loses its contents."""
        self.lifetime.observe(self.now - self.taken[block])
        self.idle.observe(self.now - self.released_at[block])
