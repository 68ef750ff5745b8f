"""How much memory there is, and how many pages of KV cache that makes. Limits of containers (cgroups) count."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from cutaway_server.errors import ModelError

CGROUP = Path("/sys/fs/cgroup")
MIB = 2**20


def available_bytes(device: torch.device, cgroup: Path = CGROUP) -> int:
    """Bytes that can still be allocated on `device`: the least that the machine and the container allow."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    room = [int(psutil.virtual_memory().available)]
    for limit, used, reclaimable in (
        ("memory.max", "memory.current", "memory.stat"),  # cgroup v2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),  # cgroup v1
    ):
        most, now = _number(cgroup / limit), _number(cgroup / used)
        if most is not None and now is not None:
            room.append(max(0, most - now + _inactive_file(cgroup / reclaimable)))
    return min(room)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max" is no limit


def _inactive_file(path: Path) -> int:
    """Bytes of the page cache that the kernel gives back when asked, such as the model file just read."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def count_pages(
    *, available: int, utilization: float, kv_cache_memory: int | None, page_bytes: int, page_size: int,
    max_context: int, max_running: int,
) -> int:  # fmt: skip
    """Pages of the pool, page 0 (which nobody owns) included: what memory allows, and no more than can be used.

    Raises:
        ModelError: not even one sequence of `max_context` tokens fits.
    """
    budget = kv_cache_memory if kv_cache_memory is not None else int(available * utilization)
    per_sequence = -(-max_context // page_size)
    pages = min(budget // page_bytes, max_running * per_sequence + 1)
    if pages < per_sequence + 1:
        need = (per_sequence + 1) * page_bytes
        raise ModelError(
            f"the KV cache gets {budget / MIB:.0f} MiB, but one sequence of max_context={max_context} tokens needs "
            f"{need / MIB:.0f} MiB: give more with --kv-cache-memory or --memory-utilization, or lower --max-context"
        )
    return pages
