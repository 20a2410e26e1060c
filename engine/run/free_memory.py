"""The memory that a process may take: what device and machine have free, and what the control
groups around it (containers, pods, batch systems) leave to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch


class _Names(NamedTuple):
    """The files of a version of control groups."""

    limit: str
    usage: str
    reclaimable: str  # in memory.stat


_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Names("memory.max", "memory.current", "inactive_file")


def free_memory(device: torch.device) -> int:
    """Bytes that a new process may take on the device: on a CPU the least of what the machine and
    the control groups around this process have left."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
            limited = free_in_cgroups()
            return available if limited is None else min(available, limited)
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def free_in_cgroups(root: Path = Path("/")) -> int | None:
    """Bytes that the tightest control group around this process leaves; None where none limits it.

    What a group counts against its limit includes the page cache, whose inactive part gives way.

    Args:
        root: where /proc and /sys are.
    """
    left = [free for group, names in _groups(root) if (free := _free(group, names)) is not None]
    return min(left, default=None)


def _groups(root: Path) -> list[tuple[Path, _Names]]:
    """The directories of the groups of this process and of all above them.

    In a container the path may be the host's, of which only the mount point exists: the rest of
    the way is passed over.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        group = mount / path.lstrip("/")
        while group != mount and mount in group.parents:
            found.append((group, _V1 if controllers else _V2))
            group = group.parent
        found.append((mount, _V1 if controllers else _V2))
    return found


def _free(group: Path, names: _Names) -> int | None:
    """Below a group's limit; None where it has none, or is not to be seen from here."""
    try:
        limit = int((group / names.limit).read_text())
        usage = int((group / names.usage).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # "max", no such file, not ours to read
        return None
    return max(0, limit - usage + int(statistics.get(names.reclaimable, 0)))
