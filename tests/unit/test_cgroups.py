"""Limits of cgroups: nested ones, of both versions, as systemd, Docker and Kubernetes make them; and real ones."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from narsil.cgroups import cpu_quota, memory_limit, usable_cores

MIB = 1 << 20
V2 = "cgroup2 cgroup2 rw,nsdelegate"
V1_CPU = "cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "cgroup cgroup rw,memory"
NO_LIMIT = "9223372036854771712\n"


def machine(root: Path, memberships: str, mounts: list[tuple[str, str, str]], files: dict[str, str]) -> Path:
    """A root folder: what /proc/self/cgroup says, what is mounted as (top, place, kind), and the cgroups' files."""
    everything = {
        "proc/self/cgroup": memberships,
        "proc/self/mountinfo": "".join(
            f"{30 + number} 25 0:{30 + number} {top} {place} rw,nosuid shared:9 - {kind}\n"
            for number, (top, place, kind) in enumerate([("/", "/proc", "proc proc rw"), *mounts])
        ),
        **files,
    }
    for name, text in everything.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_least_quota_of_nested_cgroups_holds(tmp_path):
    root = machine(
        tmp_path,
        "0::/system.slice/narsil.service\n",
        [("/", "/sys/fs/cgroup", V2)],
        {
            "sys/fs/cgroup/system.slice/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/system.slice/narsil.service/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/user.slice/cpu.max": "10000 100000\n",  # somebody else's
        },
    )
    assert cpu_quota(root) == 1.5


def test_systemd_s_quota_of_the_service_itself_is_seen(tmp_path):
    root = machine(
        tmp_path,
        "0::/system.slice/narsil.service\n",
        [("/", "/sys/fs/cgroup", V2)],
        {
            "sys/fs/cgroup/system.slice/cpu.max": "max 100000\n",
            "sys/fs/cgroup/system.slice/narsil.service/cpu.max": "20000 100000\n",
        },
    )
    assert cpu_quota(root) == 0.2
    assert usable_cores(root) == 1


@pytest.mark.parametrize("path", ["/docker/4f1e", "/docker/4f1e/inner"])
def test_a_container_that_sees_only_its_own_part_of_version_1(tmp_path, path):
    """Without a namespace of its own: the path is the host's, and the mount's top is part of it."""
    root = machine(
        tmp_path,
        f"5:cpu,cpuacct:{path}\n4:memory:{path}\n1:name=systemd:{path}\n0::/\n",
        [
            ("/docker/4f1e", "/sys/fs/cgroup/cpu,cpuacct", V1_CPU),
            ("/docker/4f1e", "/sys/fs/cgroup/memory", V1_MEMORY),
        ],
        {
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/inner/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/inner/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{300 * MIB}\n",
            "sys/fs/cgroup/memory/inner/memory.limit_in_bytes": NO_LIMIT,
        },
    )
    assert cpu_quota(root) == 2.5
    assert memory_limit(root) == 300 * MIB


def test_a_container_with_a_namespace_of_its_own(tmp_path):
    root = machine(
        tmp_path,
        "0::/\n",
        [("/", "/sys/fs/cgroup", V2)],
        {"sys/fs/cgroup/cpu.max": "50000 100000\n", "sys/fs/cgroup/memory.max": f"{64 * MIB}\n"},
    )
    assert cpu_quota(root) == 0.5
    assert memory_limit(root) == 64 * MIB


def test_controllers_in_hierarchies_of_both_versions_and_a_place_with_a_blank(tmp_path):
    root = machine(
        tmp_path,
        "3:cpu,cpuacct:/a\n0::/b\n",
        [("/", "/own\\040place/cpu", V1_CPU), ("/", "/sys/fs/cgroup/unified", V2)],
        {
            "own place/cpu/a/cpu.cfs_quota_us": "300000\n",
            "own place/cpu/a/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/unified/b/memory.max": f"{9 * MIB}\n",
        },
    )
    assert cpu_quota(root) == 3.0
    assert memory_limit(root) == 9 * MIB


@pytest.mark.parametrize(("mine", "top"), [("/mine", "/another"), ("/mine", "/min"), ("/../mine", "/")])
def test_limits_of_cgroups_that_this_process_is_not_in_do_not_hold(tmp_path, mine, top):
    root = machine(
        tmp_path,
        f"5:cpu,cpuacct:{mine}\n0::{mine}\n",
        [(top, "/sys/fs/cgroup/cpu", V1_CPU), (top, "/sys/fs/cgroup/unified", V2)],
        {
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "10000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/unified/cpu.max": "10000 100000\n",
        },
    )
    assert cpu_quota(root) is None


def test_memory_is_the_least_of_the_machine_s_and_of_every_cgroup_s_limits(tmp_path):
    mounts = [("/", "/sys/fs/cgroup", V2)]
    files = {
        "proc/meminfo": "MemTotal:        8192 kB\nMemFree:         1 kB\n",
        "sys/fs/cgroup/a/memory.max": f"{6 * MIB}\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/b/memory.high": "max\n",
    }
    assert memory_limit(machine(tmp_path / "all", "0::/a/b\n", mounts, files)) == 6 * MIB
    high = {**files, "sys/fs/cgroup/a/b/memory.high": f"{5 * MIB}\n"}
    assert memory_limit(machine(tmp_path / "high", "0::/a/b\n", mounts, high)) == 5 * MIB
    assert memory_limit(machine(tmp_path / "none", "0::/\n", mounts, files)) == 8 * MIB


@pytest.mark.parametrize(
    "text",
    ["", "nonsense", "0 100000\n", "100000\n", "100000 0\n", "max max\n", "-1 100000\n"],
)
def test_what_is_no_limit_is_none(tmp_path, text):
    root = machine(
        tmp_path,
        f"{text}\n0::/a\n::\n",
        [("/", "/sys/fs/cgroup", V2), (text.strip() or "x", "y", "z")],
        {"sys/fs/cgroup/a/cpu.max": text, "sys/fs/cgroup/a/memory.max": "max\n"},
    )
    assert cpu_quota(root) is None
    assert memory_limit(root) is None


def test_without_the_kernel_s_tables_there_is_no_limit(tmp_path):
    assert cpu_quota(tmp_path) is None
    assert memory_limit(tmp_path) is None
    assert usable_cores(tmp_path) >= 1


def test_a_quota_bounds_the_usable_cores_and_leaves_one_at_least(tmp_path):
    def cores(limit: int) -> int:
        files = {"sys/fs/cgroup/cpu.max": f"{limit} 100000\n"}
        return usable_cores(machine(tmp_path / str(limit), "0::/\n", [("/", "/sys/fs/cgroup", V2)], files))

    assert cores(1000) == 1
    assert cores(100_000) == 1
    assert cores(1 << 40) == usable_cores(tmp_path)


@contextmanager
def nested_cgroup(controller: str, limits: dict[str, str]) -> Iterator[Path]:
    """A cgroup of version 1 in a new one, which has these limits, below this process's own. Skips where that cannot be
    made."""
    own = [
        line.split(":", 2)[2]
        for line in Path("/proc/self/cgroup").read_text().splitlines()
        if f":{controller}:" in line
    ]
    if not own:
        pytest.skip(f"no hierarchy of cgroups of version 1 has {controller} alone")
    outer = Path(f"/sys/fs/cgroup/{controller}{own[0]}") / f"narsil-test-{os.getpid()}"
    inner = outer / "inner"
    try:
        inner.mkdir(parents=True)
    except OSError as error:
        pytest.skip(f"{outer} cannot be made: {error.strerror}")
    try:
        for name, value in limits.items():
            (outer / name).write_text(value)
        yield inner
    finally:
        inner.rmdir()
        outer.rmdir()


def told_in(cgroup: Path, expression: str) -> str:
    """What a process in this cgroup prints."""
    program = f"from narsil.cgroups import *; print({expression})"
    script = f'echo $$ > {cgroup}/cgroup.procs && exec {sys.executable} -c "{program}"'
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    return subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, check=True, env=environment
    ).stdout.strip()


def test_the_kernel_s_own_nested_quota_is_seen():
    with nested_cgroup("cpu", {"cpu.cfs_period_us": "50000", "cpu.cfs_quota_us": "60000"}) as cgroup:
        assert told_in(cgroup, "cpu_quota(), usable_cores()") == "1.2 1"


def test_the_kernel_s_own_nested_memory_limit_is_seen():
    with nested_cgroup("memory", {"memory.limit_in_bytes": str(200 * MIB)}) as cgroup:
        assert told_in(cgroup, "memory_limit()") == str(200 * MIB)
