"""Memory of this process: its cgroup limit, its resident set, and glibc's allocator."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from pathlib import Path

# Share of the free memory. The rest is for what requests do not reserve: responses, sockets, allocators, the JSON
# worker process, and the page cache that holds the code of this process.
SAFETY_SHARE = 0.75

KEPT_BYTES = 32 * 1024 * 1024  # largest freed block that the allocator keeps; glibc's maximum
ARENAS = 4  # glibc's default is eight per core, and each keeps its own freed blocks


def free_bytes(*, processes: int = 1) -> int:
    """Return the memory for requests: the limit of the container or machine minus the resident set of this process.

    Where several processes serve, each has an equal part of the limit.
    """
    return max(0, int((memory_limit_bytes() // processes - resident_bytes()) * SAFETY_SHARE))


def memory_limit_bytes() -> int:
    """Return the smallest memory limit of this process: of its cgroups, or the memory of the machine."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder in cgroup_folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):  # version 2 and 1
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                limits.append(int((folder / name).read_text()))
    return min(limits)


def cgroup_folders(controller: str) -> set[Path]:
    """Return the folders of this process' cgroups, version 2 and 1, and of their ancestors.

    In a container only the root may be visible.
    """
    found: set[Path] = set()
    root = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                tops = [root, root / "unified"]
            elif controller in controllers.split(","):
                tops = [root / controller, root / controllers]
            else:
                continue
            for top in tops:
                folder = top / path.lstrip("/")
                found |= {top, folder, *(parent for parent in folder.parents if parent.is_relative_to(top))}
    return found


def resident_bytes(process: int | str = "self") -> int:
    """Return the resident set size of a process, by default this one; 0 without /proc."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


_libc = ctypes.CDLL(None)


def keep_freed_memory() -> None:
    """Configure glibc to keep freed blocks up to KEPT_BYTES for the next model call; no effect with other C libraries.

    By default large blocks are unmapped when freed, and mapping them again takes a sixth of the time of a call with 64
    images. Call it before threads are started: glibc fixes the number of arenas with the first ones.
    """
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # M_TRIM_THRESHOLD and so on of malloc.h
    if mallopt := getattr(_libc, "mallopt", None):
        mallopt(trim_threshold, KEPT_BYTES)
        mallopt(mmap_threshold, KEPT_BYTES)
        mallopt(arena_max, ARENAS)


_trimmed_s = 0.0
_malloc_trim = getattr(_libc, "malloc_trim", None)


def return_freed_memory(*, at_most_every_s: float = 0.0) -> None:
    """Return freed pages to the system (glibc's malloc_trim), which blocks allocations in other threads meanwhile."""
    global _trimmed_s
    now_s = time.monotonic()
    if _malloc_trim and now_s - _trimmed_s >= at_most_every_s:
        _trimmed_s = now_s
        _malloc_trim(0)
