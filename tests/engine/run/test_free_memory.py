"""Memory limits of control groups, in made-up roots."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from warpo.engine.run import free_memory
from warpo.engine.run.free_memory import free_in_cgroups

GIB = 2**30


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def v2(root: Path, group: str, limit: str, usage: int = 0, inactive: int = 0) -> None:
    base = f"sys/fs/cgroup{group}"
    write(
        root,
        **{
            f"{base}/memory.max": f"{limit}\n",
            f"{base}/memory.current": f"{usage}\n",
            f"{base}/memory.stat": f"anon 1\ninactive_file {inactive}\n",
        },
    )


def v1(root: Path, group: str, limit: int, usage: int = 0, inactive: int = 0) -> None:
    base = f"sys/fs/cgroup/memory{group}"
    write(
        root,
        **{
            f"{base}/memory.limit_in_bytes": f"{limit}\n",
            f"{base}/memory.usage_in_bytes": f"{usage}\n",
            f"{base}/memory.stat": f"cache 1\ntotal_inactive_file {inactive}\n",
        },
    )


def test_the_least_of_all_nested_groups_counts(tmp_path: Path) -> None:
    write(tmp_path, **{"proc/self/cgroup": "0::/slurm/job 7/step\n"})
    v2(tmp_path, "/slurm/job 7/step", "max")
    v2(tmp_path, "/slurm/job 7", str(8 * GIB), usage=3 * GIB, inactive=GIB)
    v2(tmp_path, "/slurm", str(7 * GIB), usage=3 * GIB)
    assert free_in_cgroups(tmp_path) == 4 * GIB
    v2(tmp_path, "/slurm/job 7/step", str(GIB), usage=2 * GIB)
    assert free_in_cgroups(tmp_path) == 0


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    write(tmp_path, **{"proc/self/cgroup": "0::/\n"})
    v2(tmp_path, "", str(2 * GIB), usage=GIB)
    assert free_in_cgroups(tmp_path) == GIB


def test_version_1_with_the_path_of_the_host(tmp_path: Path) -> None:
    lines = "12:cpu,cpuacct:/docker/ab\n5:memory:/docker/ab\n1:name=systemd:/docker/ab\n0::/\n"
    write(tmp_path, **{"proc/self/cgroup": lines})
    v1(tmp_path, "", 4 * GIB, usage=2 * GIB, inactive=GIB)
    assert free_in_cgroups(tmp_path) == 3 * GIB
    v1(tmp_path, "/docker/ab", 2 * GIB, usage=GIB)
    assert free_in_cgroups(tmp_path) == GIB


@pytest.mark.parametrize("lines", ["0::/a\n", "5:memory:/a\n", "", "5:cpu:/a\n"])
def test_where_nothing_limits_there_is_no_number(tmp_path: Path, lines: str) -> None:
    assert free_in_cgroups(tmp_path) is None
    write(tmp_path, **{"proc/self/cgroup": lines})
    v2(tmp_path, "/a", "max")
    assert free_in_cgroups(tmp_path) is None


def test_the_plan_counts_what_the_container_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    machine = free_memory.free_memory(cpu)
    monkeypatch.setattr(free_memory, "free_in_cgroups", lambda: 123)
    assert free_memory.free_memory(cpu) == 123 < machine
    monkeypatch.setattr(free_memory, "free_in_cgroups", lambda: None)
    assert free_memory.free_memory(cpu) > 123
