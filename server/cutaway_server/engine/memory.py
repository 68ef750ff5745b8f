"""How much memory there is, and how many pages of KV cache that makes. Limits of containers (cgroups) count."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from cutaway_server.errors import ModelError

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
MIB = 2**20


def available_bytes(device: torch.device, cgroups: Path = CGROUPS, own: Path = OWN_CGROUPS) -> int:
    """Bytes that can still be allocated on `device`: the least that the machine and its containers allow."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    rooms = (_room(group) for group in _groups(cgroups, own))
    return min([int(psutil.virtual_memory().available), *(room for room in rooms if room is not None)])


def _groups(cgroups: Path, own: Path) -> Iterator[Path]:
    """This process's memory cgroup and all above it: each one's limit holds. Sees both versions of cgroups."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    for line in [*lines, "0::/", "0:memory:/"]:  # inside a container the path is the host's, and the limit at the top
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            top = cgroups / "memory" if controllers else cgroups
            group = top / path.strip("/")
            yield from (parent for parent in (group, *group.parents) if parent.is_relative_to(top))


def _room(group: Path) -> int | None:
    """What a cgroup has left; None where it sets no limit."""
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        most, now = _number(group / limit), _number(group / used)
        if most is not None and now is not None:
            return max(0, most - now + _inactive_file(group / "memory.stat"))
    return None


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
