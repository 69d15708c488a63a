"""Speed at which the CPU part of attention reads memory, beside what this machine's cores can.

One layer of synthetic KV, larger than any cache; before every timed call another layer is read, so
that the caches hold nothing useful. In each repeat, for one thread and for all of them:

    read        sequential, and random blocks with the next one prefetched: the limits
    scan        digests of every block size, of sequential read
    attention   random blocks, one by one, of random read
    task        the whole: scan, top-k, union, attention, merge, on the pool, of random read
    top-k       beside torch.topk

A figure is the median over repeats; a share of a limit is the median of the shares of each repeat.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fluxion_core.geometry import BLOCK_SIZES, KvGeometry
from fluxion_core.kernels import _native
from fluxion_core.kernels.block_digest import cpu as block_digest
from fluxion_core.kernels.isa import native_layout
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.lab.benchmark.report import describe_machine, median_of
from fluxion_core.lab.plots.bars import draw_bars
from fluxion_core.machine.cpus import usable_cpus
from fluxion_core.planning.constants import READ_ALL, READ_NOTHING
from fluxion_core.planning.policy import FixedPolicy
from fluxion_core.pool.cpu_pool import CpuPool


@dataclass(frozen=True)
class KernelShape:
    """Attention of one layer for one sequence."""

    name: str
    num_kv_heads: int
    group: int
    """Query heads to each KV head."""
    head_dim: int
    num_tokens: int
    digest_bits: int = 16

    @property
    def geometry(self) -> KvGeometry:
        """Two layers: one is measured while the other clears the caches."""
        return KvGeometry(2, self.num_kv_heads, self.head_dim, digest_bits=self.digest_bits)


SHAPES = (
    KernelShape("groups of 4", num_kv_heads=8, group=4, head_dim=128, num_tokens=131_072),
    KernelShape("groups of 4, byte digests", 8, 4, 128, 131_072, digest_bits=8),
    KernelShape("groups of 8", num_kv_heads=8, group=8, head_dim=128, num_tokens=131_072),
    KernelShape("SmolLM2", num_kv_heads=3, group=3, head_dim=64, num_tokens=524_288),
)

BUDGET = 0.05
READ_PIECE_BYTES = 65_536


@dataclass(frozen=True)
class Figure:
    """One operation on so many threads."""

    operation: str
    threads: int
    gigabytes_per_second: float
    limit: str
    """What it is compared with; empty for a limit itself."""
    share_of_limit: float
    lowest_share: float


def run_kernel_bench(
    console: Console, *, repeats: int = 7, shapes: tuple[KernelShape, ...] = SHAPES
) -> dict[str, object]:
    """Measure every shape; print a table, return everything as plain data."""
    torch.set_num_threads(1)
    machine = describe_machine()
    console.print(f"[bold]kernels[/bold], cold caches; {machine}", highlight=False)
    results: list[dict[str, object]] = []
    for shape in shapes:
        measured = _Workload(shape)
        counts = sorted({1, len(usable_cpus())})
        figures = [figure for threads in counts for figure in _figures(measured, threads, repeats)]
        results.append({"shape": asdict(shape), "figures": [asdict(f) for f in figures]})
        _print(console, shape, figures)
    top_k = measure_top_k(repeats=repeats)
    console.print(
        f"top-k, 410 of 8,192 scores: {top_k['native_microseconds']:.1f} us, "
        f"torch.topk {top_k['torch_microseconds']:.1f} us: {top_k['ratio']:.1f}x",
        highlight=False,
    )
    return {"machine": machine, "repeats": repeats, "results": results, "top_k": top_k}


def measure_top_k(*, blocks: int = 8192, budget: int = 410, repeats: int = 7) -> dict[str, float]:
    """Native exact top-k beside torch.topk, one head, microseconds; many heads a call."""
    heads = 64
    scores = torch.randn(heads, blocks, generator=torch.Generator().manual_seed(0))
    budgets = torch.full((heads,), budget, dtype=torch.int32)
    marks = torch.empty(heads, -(-blocks // 64), dtype=torch.int64)

    def native() -> None:
        _native.choose_top(scores.numpy(), budgets.numpy(), marks.numpy())

    def with_torch() -> None:
        for row in scores:
            torch.topk(row, budget)

    runs = []
    for _ in range(repeats + 1):
        runs.append({"native": _seconds(native), "torch": _seconds(with_torch)})
    del runs[0]
    scale = 1e6 / heads
    return {
        "native_microseconds": median_of(runs, lambda r: r["native"]) * scale,
        "torch_microseconds": median_of(runs, lambda r: r["torch"]) * scale,
        "ratio": median_of(runs, lambda r: r["torch"] / r["native"]),
    }


def plot(report: dict[str, object], path: Path) -> None:
    """Bars of the first shape on all threads, beside both limits."""
    results = report["results"]
    assert isinstance(results, list)
    figures = [Figure(**figure) for figure in results[0]["figures"]]
    threads = max(figure.threads for figure in figures)
    here = [figure for figure in figures if figure.threads == threads]
    machine = report["machine"]
    assert isinstance(machine, dict)
    draw_bars(
        path,
        f"{results[0]['shape']['name']}, {threads} threads, {machine['processor']}",
        [(f.operation, f.gigabytes_per_second) for f in here if f.limit],
        unit="GB/s",
        limits=[(f.operation, f.gigabytes_per_second) for f in here if not f.limit],
    )


class _Workload:
    """Synthetic KV of one shape, and the calls that are timed. Each returns (bytes, seconds)."""

    def __init__(self, shape: KernelShape) -> None:
        self.shape, self.geometry = shape, shape.geometry
        geometry = self.geometry
        slabs = geometry.slabs_for(shape.num_tokens)
        self._store = HostKvStore(
            geometry, slabs * (geometry.slab_bytes + 4096), model_key=b"bench", populate=True
        )
        self._table = torch.tensor([self._store.slab_address(i) for i in range(slabs)])
        self._fill()
        generator = torch.Generator().manual_seed(1)
        self._query = torch.randn(
            shape.num_kv_heads * shape.group, shape.head_dim, generator=generator
        )
        self._output = torch.empty_like(self._query)
        self._lse = torch.empty(self._query.shape[0])
        self._layer = 0

    def _fill(self) -> None:
        """Random KV, a different mixture of two slabs' worth in each slab."""
        geometry = self.geometry
        shape = (geometry.num_kv_heads, geometry.slab_blocks, 2, 16, geometry.head_dim)
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(shape, generator=generator) for _ in range(2))
        for slab, address in enumerate(self._table.tolist()):
            payload = (a + b * (slab % 97 / 97)).bfloat16()
            for layer in range(geometry.num_layers):
                block_digest.ingest_blocks(
                    geometry,
                    address,
                    layer,
                    0,
                    geometry.slab_tokens,
                    block_digest.payload_of(payload),
                )

    def clear_caches(self) -> None:
        """Read the layer that is not measured next; the layers take turns."""
        pieces = self._pieces(READ_PIECE_BYTES, self._layer)
        cpus = usable_cpus()
        _native.read_seconds(pieces, READ_PIECE_BYTES, cpus)
        self._layer = 1 - self._layer

    def read_sequential(self, cpus: list[int]) -> tuple[int, float]:
        """The limit of everything that goes through memory in order."""
        pieces = self._pieces(READ_PIECE_BYTES, self._layer)
        seconds = _native.read_seconds(pieces, READ_PIECE_BYTES, cpus)
        return len(pieces) * READ_PIECE_BYTES, seconds

    def read_random(self, cpus: list[int]) -> tuple[int, float]:
        """The limit of everything that goes through blocks in any order."""
        blocks, size = self._random_blocks(), self.geometry.block_bytes
        seconds = _native.read_seconds(blocks, size, cpus)
        return len(blocks) * size, seconds

    def scan(self, level: int, cpus: list[int]) -> tuple[int, float]:
        """Scores of all blocks of both layers, one KV head after the other."""
        geometry = self.geometry
        width, record_bytes = geometry.record_blocks(level), geometry.record_bytes(level)
        inside = np.arange(0, geometry.level_bytes(level), record_bytes)
        heads = [
            self._table.numpy() + geometry.digest_offset(layer, head, level)
            for layer in range(geometry.num_layers)
            for head in range(geometry.num_kv_heads)
        ]
        records = np.ascontiguousarray((np.concatenate(heads)[:, None] + inside).ravel())
        seconds = _native.score_seconds(
            geometry.digest_bits,
            self._query.numpy(),
            records,
            record_bytes,
            width,
            cpus,
        )
        return len(records) * record_bytes, seconds

    def attend(self, cpus: list[int]) -> tuple[int, float]:
        """All blocks in random order."""
        blocks = self._random_blocks()
        seconds = _native.attend_seconds(
            self._query.numpy(),
            blocks,
            cpus,
        )
        return len(blocks) * self.geometry.block_bytes, seconds

    def task(self, pool: CpuPool, level: int, budget_blocks: int) -> tuple[int, float]:
        """One layer of a decode step without its window: all KV heads, on the pool."""
        geometry, shape = self.geometry, self.shape
        sequence = np.array(
            [[self._table.data_ptr(), shape.num_tokens, 0, shape.num_tokens, 0]], np.int64
        )
        num_heads = self._query.shape[0]
        budgets = np.full((1, num_heads), budget_blocks, np.int32)

        def attention_of(level: int) -> _native.LayerAttention:
            plans = _native.GivenPlans(np.full((1, shape.num_kv_heads), level, np.int32), budgets)
            return _native.LayerAttention(native_layout(geometry), sequence, num_heads, [plans])

        def run(attention: _native.LayerAttention) -> None:
            attention.submit(
                pool.native,
                self._layer,
                self._query[None].numpy(),
                self._output[None].numpy(),
                self._lse[None].numpy(),
                0,
            )
            pool.wait()

        # Decoding goes from layer to layer; its threads are awake.
        run(attention_of(READ_NOTHING))
        attention = attention_of(level)
        seconds = _seconds(lambda: run(attention))
        attention.finish_layer()
        return sum(attention.read_bytes(0)), seconds

    def _pieces(self, size: int, layer: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Addresses of a layer's KV in pieces, in the order of memory within each slab."""
        inside = np.arange(0, self.geometry.layer_kv_bytes, size)
        starts = self._table.numpy() + self.geometry.kv_offset(layer)
        return np.ascontiguousarray((starts[:, None] + inside).ravel())

    def _random_blocks(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        blocks = self._pieces(self.geometry.block_bytes, self._layer)
        np.random.default_rng(0).shuffle(blocks)
        return blocks


def _figures(measured: _Workload, threads: int, repeats: int) -> list[Figure]:
    """Every operation on so many threads."""
    cpus = usable_cpus()[:threads]
    pool = CpuPool(threads, spin_microseconds=500 if threads > 2 else 0)
    tokens = range(measured.shape.num_tokens)
    operations: dict[str, Callable[[], tuple[int, float]]] = {
        "sequential read": lambda: measured.read_sequential(cpus),
        "random read": lambda: measured.read_random(cpus),
        "attention, random blocks": lambda: measured.attend(cpus),
        "task, exact": lambda: measured.task(pool, READ_ALL, 0),
    }
    for level, size in enumerate(BLOCK_SIZES):
        policy = FixedPolicy(size, BUDGET)
        operations[f"scan, block {size}"] = partial(measured.scan, level, cpus)
        blocks = policy.num_blocks(tokens)
        operations[f"task, {policy}"] = partial(measured.task, pool, policy.level, blocks)
    runs = []
    for _ in range(repeats + 1):
        run = {}
        for name, operation in operations.items():
            measured.clear_caches()
            size, seconds = operation()
            run[name] = size / seconds / 1e9
        runs.append(run)
    del runs[0]
    return [_figure(name, threads, runs) for name in operations]


def _figure(name: str, threads: int, runs: list[dict[str, float]]) -> Figure:
    limit = "" if name.endswith("read") else "random read"
    if name.startswith("scan"):
        limit = "sequential read"
    shares = [run[name] / run[limit] for run in runs] if limit else [1.0]
    return Figure(
        name,
        threads,
        median_of(runs, lambda run: run[name]),
        limit,
        float(np.median(shares)),
        min(shares),
    )


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _print(console: Console, shape: KernelShape, figures: list[Figure]) -> None:
    table = Table(
        box=None,
        pad_edge=False,
        title=f"{shape.name}: {shape.num_kv_heads} KV heads, head_dim {shape.head_dim}, "
        f"{shape.num_tokens:,} tokens",
        title_justify="left",
    )
    for column in ("operation", "threads", "GB/s", "of", "share", "lowest"):
        table.add_column(column, justify="left" if column in ("operation", "of") else "right")
    for figure in figures:
        table.add_row(
            figure.operation,
            str(figure.threads),
            f"{figure.gigabytes_per_second:.1f}",
            figure.limit,
            f"{figure.share_of_limit:.2f}" if figure.limit else "",
            f"{figure.lowest_share:.2f}" if figure.limit else "",
        )
    console.print(table)
