"""The number of threads that compute fastest, by the cores that this process may use."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from kvcompose_local.install.pin import output_of

#: A core is slow with less than this share of the fastest one's capacity (Linux' cpu_capacity: little cores have 250
#: to 450 beside 1024, middle ones, which are worth a thread, 700 and more), or of its highest clock, which differs less
#: between kinds, and by up to a tenth within one.
_SLOW_CAPACITY, _SLOW_CLOCK = 0.6, 0.8
_CPUS = "sys/devices/system/cpu"


def default_threads(root: Path = Path("/")) -> int:
    """The default number of threads: one for each fast physical core that we may use, at least 1.

    Every layer waits for its slowest thread, many times a token: a core's second thread, a slow core, a core that the
    affinity or a cpuset denies and time that a cgroup's quota denies (Linux) all make llama.cpp slower. A quota's
    fraction is left alone: one thread more uses the quota up sooner, and then all of them wait.

    root: where Linux' /proc and /sys are.
    """
    if sys.platform == "darwin":
        fast = output_of(["sysctl", "-n", "hw.perflevel0.physicalcpu"])  # Apple silicon; Intel has no levels
        return int(fast) if fast.isdecimal() and int(fast) else _physical_cores()
    if sys.platform != "linux":
        return _physical_cores()
    cores = len(_physical(root, fast_cpus(root, os.sched_getaffinity(0))))
    return max(1, int(min(cores, cpu_quota(root))))


def fast_cpus(root: Path, cpus: Iterable[int]) -> set[int]:
    """Linux' numbers of the CPUs among ``cpus`` that are not of a slower kind than others among them."""
    cpus = set(cpus)
    performance = _numbers(_read(root / "sys/devices/cpu_core/cpus"))  # of Intel's hybrids, whose clocks lie close
    if performance & cpus:
        return performance & cpus
    for name, least in (("cpu_capacity", _SLOW_CAPACITY), ("cpufreq/cpuinfo_max_freq", _SLOW_CLOCK)):
        values = {cpu: _integer(_read(root / _CPUS / f"cpu{cpu}" / name)) for cpu in cpus}
        known = [value for value in values.values() if value is not None]
        if len(known) == len(cpus):
            return {cpu for cpu, value in values.items() if value is not None and value >= least * max(known)}
    return cpus


def _physical_cores() -> int:
    import psutil  # late: the build needs this module before anything is installed

    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def _physical(root: Path, cpus: Iterable[int]) -> set[frozenset[int]]:
    """The cores that the CPUs are threads of, each as the CPUs that share it."""
    topology = root / _CPUS
    return {
        frozenset(_numbers(_read(topology / f"cpu{cpu}/topology/thread_siblings_list")) or {cpu}) for cpu in set(cpus)
    }


def cpu_quota(root: Path = Path("/")) -> float:
    """CPUs whose time this process's control groups may use, the tightest one's; infinite where nothing limits it."""
    quotas = [float("inf")]
    for folder in _cpu_groups(root):
        if limit := _read(folder / "cpu.max").split():  # version 2
            quota, period = _integer(limit[0]), _integer(limit[-1])
        else:
            quota, period = _integer(_read(folder / "cpu.cfs_quota_us")), _integer(_read(folder / "cpu.cfs_period_us"))
        if quota and period and quota > 0:
            quotas.append(quota / period)
    return min(quotas)


def _cpu_groups(root: Path) -> Iterator[Path]:
    """The folders of the control groups that this process is in, of both versions, up to where each is mounted."""
    groups = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers or "cpu" in controllers.split(","):
            groups["cgroup" if controllers else "cgroup2"] = PurePosixPath(path)
    for line in _read(root / "proc/self/mountinfo").splitlines():
        mount, _, system = line.partition(" - ")
        fields, kind, options = mount.split(), system.partition(" ")[0], system.rpartition(" ")[2]
        if len(fields) < 5 or kind not in groups or (kind == "cgroup" and "cpu" not in options.split(",")):
            continue
        mounted, point = PurePosixPath(fields[3]), root / fields[4].lstrip("/")
        group = groups[kind]
        # Of a container that sees its own group as the root, the path may begin above what is mounted.
        inside = group.relative_to(mounted) if group.is_relative_to(mounted) else PurePosixPath()
        parts = [part for part in inside.parts if part != ".."]
        for depth in range(len(parts), -1, -1):
            yield point.joinpath(*parts[:depth])


def _numbers(text: str) -> set[int]:
    """The set that Linux writes as ``0-3,8``."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            found |= set(range(int(first), int(last or first) + 1))
    return found


def _integer(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
