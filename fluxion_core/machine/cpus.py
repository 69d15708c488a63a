"""The CPUs that this process may use: its affinity, its control group's quota, what they can do."""

from __future__ import annotations

import math
import os
from functools import cache
from pathlib import Path

_CGROUPS = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")
_CPU_INFO = Path("/proc/cpuinfo")


def usable_cpus() -> list[int]:
    """CPUs that the calling thread may run on."""
    return sorted(os.sched_getaffinity(0))


def num_usable_cpus() -> int:
    """CPUs' worth of time that this process gets: its affinity, or its quota if that is less.

    A container with `--cpus 2` sees all the machine's CPUs, and is stopped for the rest of each
    tenth of a second once all of them together have used two CPUs' share of it.
    """
    quota = cpu_quota()
    count = len(usable_cpus())
    return count if quota is None else max(1, min(count, math.floor(quota)))


def cpu_quota(groups: Path = _CGROUPS, mount: Path = _MOUNT) -> float | None:
    """The least quota of this process's control group and of those above it, in CPUs.

    Args:
        groups: lists the process's groups, as /proc/self/cgroup does.
        mount: where control groups are.

    Returns:
        None if there is no quota.
    """
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    quotas = [
        quota
        for line in lines
        if len(parts := line.split(":", 2)) == 3
        for quota in _quotas_of(parts[1].split(","), parts[2], mount)
    ]
    return min(quotas, default=None)


def _quotas_of(controllers: list[str], path: str, mount: Path) -> list[float]:
    """Quotas of a group and of those above it; in a container its own group is the mount's root."""
    if controllers == [""]:
        roots, read = [mount, mount / "unified"], _unified_quota
    elif "cpu" in controllers:
        roots, read = [mount / "cpu", mount / "cpu,cpuacct"], _quota_of_version_1
    else:
        return []
    inside = Path(path.lstrip("/"))
    folders = [root / part for root in roots for part in (inside, *inside.parents)]
    return [quota for folder in folders if (quota := read(folder)) is not None]


def _unified_quota(folder: Path) -> float | None:
    match _words(folder / "cpu.max"):
        case [quota, period] if quota.isdigit() and period.isdigit():
            return int(quota) / int(period)
    return None


def _quota_of_version_1(folder: Path) -> float | None:
    match _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us"):
        case [quota, period] if quota.isdigit() and period.isdigit():  # -1 for none
            return int(quota) / int(period)
    return None


def _words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError):
        return []


@cache
def has_bfloat16_instructions() -> bool:
    """Whether the CPU multiplies bfloat16 itself (AVX-512 BF16 or AMX)."""
    try:
        text = _CPU_INFO.read_text(encoding="utf-8")
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags
