"""Threads by what may be used: made-up /proc and /sys of machines and containers, and this machine's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from kvcompose_local.install.threads import cpu_quota, default_threads, fast_cpus

linux = pytest.mark.skipif(sys.platform != "linux", reason="affinity, /proc and /sys are Linux'")
_CPU = "sys/devices/system/cpu/cpu{}/{}"


def make(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def of_each(name: str, values: list[int]) -> dict[str, str]:
    return {_CPU.format(cpu, name): str(value) for cpu, value in enumerate(values)}


V2 = "31 30 0:27 {root} /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw,nsdelegate"
V1 = "40 32 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, float("inf")),
        # Version 2, the container sees its own group as the root.
        (
            {
                "proc/self/cgroup": "0::/",
                "proc/self/mountinfo": V2.format(root="/"),
                "sys/fs/cgroup/cpu.max": "150000 100000",
            },
            1.5,
        ),
        # Nested: the tightest of all above counts, and a group without a limit limits nothing.
        (
            {
                "proc/self/cgroup": "0::/user.slice/app.scope",
                "proc/self/mountinfo": V2.format(root="/"),
                "sys/fs/cgroup/user.slice/app.scope/cpu.max": "max 100000",
                "sys/fs/cgroup/user.slice/cpu.max": "40000 20000",
                "sys/fs/cgroup/other.slice/cpu.max": "1000 20000",
            },
            2,
        ),
        # A group outside of what the container's mount shows.
        (
            {
                "proc/self/cgroup": "0::/../../app",
                "proc/self/mountinfo": V2.format(root="/"),
                "sys/fs/cgroup/cpu.max": "300000 100000",
            },
            3,
        ),
        # Version 1, the path names more than is mounted.
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/1f\n3:cpuset:/docker/1f",
                "proc/self/mountinfo": V1.format(root="/docker/1f"),
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            0.5,
        ),
        # Version 1 without a limit beside an empty version 2, as systemd's hybrid layout has both.
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/\n0::/init.scope",
                "proc/self/mountinfo": V1.format(root="/") + "\n" + V2.format(root="/").replace("cgroup ro", "x ro"),
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            float("inf"),
        ),
        # What nobody can read as numbers.
        (
            {
                "proc/self/cgroup": "nonsense\n0::/",
                "proc/self/mountinfo": "short\n" + V2.format(root="/"),
                "sys/fs/cgroup/cpu.max": "a b",
            },
            float("inf"),
        ),
    ],
)
def test_the_tightest_quota_of_all_groups_counts(tmp_path: Path, files: dict[str, str], quota: float) -> None:
    assert cpu_quota(make(tmp_path, files)) == quota


@pytest.mark.parametrize(
    ("files", "fast"),
    [
        ({}, {0, 1, 2, 3}),
        (of_each("cpu_capacity", [1024, 1024, 1024, 1024]), {0, 1, 2, 3}),
        (of_each("cpu_capacity", [446, 446, 1024, 1024]), {2, 3}),
        (of_each("cpu_capacity", [325, 325, 780, 1024]), {2, 3}),  # a middle core is worth a thread
        (of_each("cpufreq/cpuinfo_max_freq", [1800000, 1800000, 2400000, 2400000]), {2, 3}),
        (of_each("cpufreq/cpuinfo_max_freq", [5000000, 5200000, 5000000, 5200000]), {0, 1, 2, 3}),  # favoured cores
        ({"sys/devices/cpu_core/cpus": "0-1", "sys/devices/cpu_atom/cpus": "2-3"}, {0, 1}),
        ({"sys/devices/cpu_core/cpus": "8-11"}, {0, 1, 2, 3}),  # we may use little cores alone
        ({_CPU.format(0, "cpu_capacity"): "1024"}, {0, 1, 2, 3}),  # nothing is known of the others
    ],
)
def test_little_cores_do_not_count_as_big_ones(tmp_path: Path, files: dict[str, str], fast: set[int]) -> None:
    assert fast_cpus(make(tmp_path, files), range(4)) == fast


@linux
@pytest.mark.parametrize(
    ("files", "n_threads"),
    [
        ({}, 8),
        ({_CPU.format(cpu, "topology/thread_siblings_list"): f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}, 4),
        (
            {
                _CPU.format(cpu, "topology/thread_siblings_list"): f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}"
                for cpu in range(8)
            },
            4,
        ),
        (of_each("cpu_capacity", [300, 300, 300, 300, 1024, 1024, 1024, 1024]), 4),
    ],
)
def test_threads_of_a_machine_of_eight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], n_threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    root = make(tmp_path, files)
    assert default_threads(root) == n_threads
    make(root, {"proc/self/cgroup": "0::/", "proc/self/mountinfo": V2.format(root="/")})
    for quota, expected in ((20000, 1), (100000, 1), (190000, 1), (250000, 2), (10**7, n_threads)):
        make(root, {"sys/fs/cgroup/cpu.max": f"{quota} 100000"})
        assert default_threads(root) == expected


def test_this_machine() -> None:
    assert 1 <= default_threads() <= (psutil.cpu_count() or 1)


def threads_of_a_process(*before: str) -> int:
    code = "from kvcompose_local.install.threads import default_threads; print(default_threads())"
    done = subprocess.run([*before, sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


@linux
def test_an_affinity_counts() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    code = f"import os, sys; os.sched_setaffinity(0, {{{allowed[0]}}}); os.execvp(sys.argv[1], sys.argv[1:])"
    assert threads_of_a_process(sys.executable, "-c", code) == 1


@linux
@pytest.mark.parametrize(("quota", "n_threads"), [(50000, 1), (100000, 1)])
def test_a_real_quota_counts_in_a_nested_group(quota: int, n_threads: int) -> None:
    group = Path("/sys/fs/cgroup/cpu") / f"kvcompose-test-{os.getpid()}"
    inner = group / "inner"
    try:
        inner.mkdir(parents=True)
    except OSError:
        pytest.skip("no control groups can be made here")
    try:
        (group / "cpu.cfs_quota_us").write_text(str(quota))
        join = f'echo $$ > {inner}/tasks; exec "$@"'
        assert threads_of_a_process("sh", "-c", join, "sh") == n_threads
    finally:
        inner.rmdir()
        group.rmdir()
