"""Which CPUs are ours: quotas of control groups, as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluxion_core.machine import cpus


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def groups(tmp_path: Path) -> Path:
    return tmp_path / "self-cgroup"


def test_a_group_without_a_quota_has_none(tmp_path: Path, groups: Path):
    groups.write_text("0::/a/b\n")
    write(tmp_path / "a" / "b" / "cpu.max", "max 100000\n")
    assert cpus.cpu_quota(groups, tmp_path) is None
    assert cpus.cpu_quota(tmp_path / "no such file", tmp_path) is None


def test_the_least_quota_on_the_way_up_counts(tmp_path: Path, groups: Path):
    groups.write_text("0::/pod/container\n")
    write(tmp_path / "pod" / "cpu.max", "150000 100000\n")
    write(tmp_path / "pod" / "container" / "cpu.max", "400000 100000\n")
    assert cpus.cpu_quota(groups, tmp_path) == 1.5


def test_in_a_container_its_own_group_is_the_mounts_root(tmp_path: Path, groups: Path):
    groups.write_text("0::/\n")
    write(tmp_path / "cpu.max", "200000 100000\n")
    assert cpus.cpu_quota(groups, tmp_path) == 2.0


def test_groups_of_the_first_version_have_quotas_too(tmp_path: Path, groups: Path):
    groups.write_text("4:memory:/x\n2:cpu,cpuacct:/x\n0::/\n")
    for name, text in {"cpu.cfs_quota_us": "350000\n", "cpu.cfs_period_us": "100000\n"}.items():
        write(tmp_path / "cpu" / "x" / name, text)
    assert cpus.cpu_quota(groups, tmp_path) == 3.5
    write(tmp_path / "cpu" / "x" / "cpu.cfs_quota_us", "-1\n")
    assert cpus.cpu_quota(groups, tmp_path) is None


@pytest.mark.parametrize(
    ("usable", "quota", "expected"), [(8, None, 8), (8, 3.5, 3), (2, 16.0, 2), (4, 0.5, 1)]
)
def test_threads_are_whole_cpus_within_the_quota(
    monkeypatch: pytest.MonkeyPatch, usable: int, quota: float | None, expected: int
):
    monkeypatch.setattr(cpus, "usable_cpus", lambda: list(range(usable)))
    monkeypatch.setattr(cpus, "cpu_quota", lambda: quota)
    assert cpus.num_usable_cpus() == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu avx512f avx512_bf16", True), ("fpu amx_bf16", True), ("fpu avx2", False)],
)
def test_bfloat16_instructions_are_read_off_the_cpus_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, expected: bool
):
    write(tmp_path / "cpuinfo", f"processor : 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(cpus, "_CPU_INFO", tmp_path / "cpuinfo")
    cpus.has_bfloat16_instructions.cache_clear()
    assert cpus.has_bfloat16_instructions() is expected
    cpus.has_bfloat16_instructions.cache_clear()
