"""How fast this machine reads memory: through small pages and huge ones, with and without prefetching."""

from __future__ import annotations

import ctypes
import mmap
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from pathlib import Path

import torch
from measure import Spread, rate

AHEAD = (0, 1024)  # bytes that are prefetched
Read = Callable[[int, int, int], int]  # address, bytes, bytes ahead


def read_rates(size: int, threads: int, repeats: int) -> Iterator[tuple[str, Spread]]:
    """Bytes a second of all threads together, by way of reading."""
    ones = torch.ones(size // 4)
    yield "torch, sum", rate(size, ones.sum, repeats)
    share = size // threads // 256 * 256  # of each thread
    with reader() as read_all, ThreadPoolExecutor(threads) as pool:
        if read_all is None:
            return
        for huge in (False, True):
            with mapped(size, huge) as start:
                starts = [start + i * share for i in range(threads)]
                for ahead in AHEAD:
                    read = partial(on_all, pool, read_all, starts, share, ahead)
                    how = f"prefetch {ahead} bytes ahead" if ahead else "plain"
                    yield f"{'huge' if huge else 'small'} pages, {how}", rate(share * threads, read, repeats)


def on_all(pool: ThreadPoolExecutor, read_all: Read, starts: Sequence[int], share: int, ahead: int) -> None:
    """Each thread reads its share."""
    list(pool.map(read_all, starts, repeat(share), repeat(ahead)))


def fastest_read(threads: int, size: int = 512 << 20) -> float:
    """Bytes a second, in the fastest way there is."""
    return max(spread.median for _, spread in read_rates(size, threads, 3))


@contextmanager
def reader() -> Iterator[Read | None]:
    """read.c's function, which lets other threads run; None without a compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as scratch:
        library = Path(scratch) / "read.so"
        source = Path(__file__).with_name("read.c")
        wide = ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []
        command = [compiler, "-O3", "-march=native", *wide, "-shared", "-fPIC", "-o", str(library), str(source)]
        subprocess.run(command, check=True)
        function = ctypes.CDLL(str(library)).read_all
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
        function.restype = ctypes.c_uint64
        yield function


@contextmanager
def mapped(size: int, huge: bool) -> Iterator[int]:
    """The address of so much written memory, in huge pages or small ones."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    view = (ctypes.c_char * size).from_buffer(memory)
    ctypes.memset(view, 1, size)
    yield ctypes.addressof(view)
    del view
    memory.close()
