"""How much memory kept, packed and frozen weights may take: the option fold_memory, and what the machine has left."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from normfx.weights.store import STORE

SHARE = 4
"""Without the option, all kept weights of the process may take one part in so many of a device's memory."""

RESERVE = 2
"""One part in so many of the memory that is available now may be taken; the rest is for activations, and for what a
weight needs while it is packed."""

HELD: weakref.WeakKeyDictionary[object, Mapping[str, int]] = weakref.WeakKeyDictionary()
"""Frozen variants in use, with the bytes of their constants by type of device."""


class Budget(NamedTuple):
    """limit: bytes that all kept weights of the process may take on a device; used: those that they take now."""

    limit: int
    used: int

    @property
    def room(self) -> int:
        return max(0, self.limit - self.used)


def budget(fold_memory: int | None, device: torch.device) -> Budget:
    """The budget of a device now. fold_memory: bytes; None: a quarter of the device's memory."""
    total, available = machine_memory(device)
    used = used_bytes(device)
    limit = total // SHARE if fold_memory is None else fold_memory
    return Budget(min(limit, used + available // RESERVE), used)


def used_bytes(device: torch.device) -> int:
    """Bytes of kept and frozen weights on a device."""
    return STORE.bytes_on(device.type) + sum(sizes.get(device.type, 0) for sizes in list(HELD.values()))


def machine_memory(device: torch.device) -> tuple[int, int]:
    """Bytes of memory that there are and that are available; of the CPU as far as the process's cgroups allow, and the
    same for a device whose memory cannot be asked for (fake tensors of a GPU that is not there)."""
    if device.type == "cuda" and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info(device)
        return total, free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    total, available = _system()
    for limit, used in _cgroups():
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def _system() -> tuple[int, int]:
    """The memory of the whole machine. Where the system does not tell what is available, half of all is taken to be."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {name: 1024 * int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        return sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        names = getattr(os, "sysconf_names", {})
        known = "SC_PHYS_PAGES" in names and "SC_PAGE_SIZE" in names
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 2**33
        return total, total // 2


ROOT = Path("/sys/fs/cgroup")

_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
}
"""Files of each cgroup hierarchy ("": version 2): its limit, its use, and the part that may be dropped."""


def _cgroups() -> Iterator[tuple[int, int]]:
    """Limit and use of each cgroup of the process that has a limit, and of those that contain it."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        hierarchy, _, path = rest.partition(":")
        kind = "memory" if "memory" in hierarchy.split(",") else hierarchy
        if kind in _FILES:
            yield from _limits(kind, path)


def _limits(kind: str, path: str) -> Iterator[tuple[int, int]]:
    limit_file, use_file, droppable = _FILES[kind]
    folder, _, limit_name = limit_file.rpartition("/")
    place = Path(path.lstrip("/"))
    for part in (place, *place.parents):
        group = ROOT / folder / part
        try:
            limit = (group / limit_name).read_text().strip()
            used = int((group / use_file.rpartition("/")[2]).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue  # not mounted here, or the root, which has no limit
        if limit != "max":
            yield int(limit), used - int(stat.get(droppable, 0))
