"""The kernel benchmark runs every operation, counts its bytes, and draws them."""

from __future__ import annotations

import io

from rich.console import Console

from fluxion_core.geometry import BLOCK_SIZES
from fluxion_core.lab.benchmark import kernels
from fluxion_core.lab.benchmark.kernels import KernelShape, run_kernel_bench
from fluxion_core.pool.cpu_pool import usable_cpus


def test_every_operation_is_measured_beside_its_limit_and_drawn(tmp_path):
    shapes = (KernelShape("tiny", 2, 4, 64, 4096), KernelShape("bytes", 2, 4, 64, 4096, 8))
    console = Console(file=io.StringIO(), width=120)
    report = run_kernel_bench(console, repeats=2, shapes=shapes)
    for result in report["results"]:
        names = {figure["operation"] for figure in result["figures"]}
        assert {f"scan, block {size}" for size in BLOCK_SIZES} < names
        assert {f"task, fixed({size}, 5 %)" for size in BLOCK_SIZES} < names
        assert {"sequential read", "random read", "attention, random blocks", "task, exact"} < names
        threads = {figure["threads"] for figure in result["figures"]}
        assert threads == {1, len(usable_cpus())}
        for figure in result["figures"]:
            assert figure["gigabytes_per_second"] > 0
            assert (figure["share_of_limit"] == 1.0) == (not figure["limit"])
    assert report["top_k"]["native_microseconds"] > 0
    assert "task, fixed(128, 5 %)" in console.file.getvalue()

    kernels.plot(report, tmp_path / "kernels.svg")
    assert b"<svg" in (tmp_path / "kernels.svg").read_bytes()


def test_a_task_counts_digests_and_the_union_of_blocks():
    shape = KernelShape("tiny", 2, 4, 64, 4096)
    measured = kernels._Workload(shape)
    pool = kernels.CpuPool(1)
    geometry = shape.geometry
    digests = shape.num_kv_heads * geometry.slabs_for(4096) * geometry.level_bytes(0)
    size, _ = measured.task(pool, 0, 2)
    blocks, rest = divmod(size - digests, geometry.block_bytes)
    # Two heads' worth of blocks at least, four heads' at most, for each KV head.
    assert rest == 0
    assert 2 * shape.num_kv_heads <= blocks <= 2 * 4 * shape.num_kv_heads
    exact, _ = measured.task(pool, kernels.READ_ALL, 0)
    assert exact == shape.num_kv_heads * (4096 // 16) * geometry.block_bytes
