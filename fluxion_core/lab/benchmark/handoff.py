"""Speed of KV from one process to another, and what it costs the receiver.

Three ways, interleaved in one run, each with its sender in a process of its own, on loopback:

    socket    a raw TCP socket into a preallocated buffer: what the machine can do
    stream    a bare gRPC stream of the same messages, thrown away: what Python gRPC can do
    hand-off  our frames with CRC32C, checked, copied into a host KV store, digests built

The hand-off is to reach at least 0.8 of the stream. All three send the same frames, made before the
clock starts: this measures the way and the receiver, not the prefill.

Here: shapes, clocks, medians and the table. The ways themselves need gRPC, which only services may
import: services/cli/handoff_bench.py.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from fluxion_core.geometry import KvGeometry
from fluxion_core.kvstream.handoff import KvLayout
from fluxion_core.lab.benchmark.report import describe_machine


@dataclass(frozen=True)
class Shape:
    """One model's KV for one prompt."""

    name: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_tokens: int

    @property
    def geometry(self) -> KvGeometry:
        """Slabs of 512 tokens."""
        return KvGeometry(self.num_layers, self.num_kv_heads, self.head_dim)

    @property
    def layout(self) -> KvLayout:
        """The layout that both ends must agree on."""
        return KvLayout(
            model_name=self.name,
            revision_hash="bench",
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rope_theta=1e4,
            tokenizer_fingerprint="bench",
        )


SHAPES = (
    Shape("SmolLM2-135M", num_layers=30, num_kv_heads=3, head_dim=64, num_tokens=7000),
    Shape("Llama-3.1-8B", num_layers=32, num_kv_heads=8, head_dim=128, num_tokens=4096),
)


@dataclass(frozen=True)
class Transfer:
    """One way, one run, as the receiver saw it."""

    way: str
    payload_bytes: int
    seconds: float
    cpu_seconds: float

    @property
    def gigabytes_per_second(self) -> float:
        """Payload over wall-clock time."""
        return self.payload_bytes / self.seconds / 1e9

    @property
    def cpu_seconds_per_gigabyte(self) -> float:
        """The receiver's processor time over payload."""
        return self.cpu_seconds / self.payload_bytes * 1e9


Sending = Callable[[Shape], AbstractContextManager[Callable[[], list[Transfer]]]]
"""Starts a sender for a shape; each call inside the block measures socket, stream and hand-off."""


def run_handoff_bench(
    console: Console, sending: Sending, *, repeats: int = 5, shapes: tuple[Shape, ...] = SHAPES
) -> dict[str, object]:
    """Measure all ways for every shape; print a table, return everything as plain data.

    Args:
        console: where the table goes.
        sending: the ways.
        repeats: interleaved runs of each way, after one that does not count; medians are shown.
        shapes: models and prompt lengths.
    """
    results = []
    for shape in shapes:
        with sending(shape) as measure:
            measure()
            results.append(_summary(shape, [measure() for _ in range(repeats)]))
    report: dict[str, object] = {"machine": describe_machine(), "results": results}
    _print(console, report, results)
    return report


class Clock:
    """Wall-clock and processor time of this process, from now on."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def transfer(self, way: str, payload_bytes: int) -> Transfer:
        """The transfer since this clock began."""
        seconds = time.perf_counter() - self._wall
        return Transfer(way, payload_bytes, seconds, time.process_time() - self._cpu)


def _summary(shape: Shape, runs: list[list[Transfer]]) -> dict[str, object]:
    """Medians of each way, and the hand-off beside the stream, run by run."""
    by_way = list(zip(*runs, strict=True))

    def median(way: tuple[Transfer, ...], of: Callable[[Transfer], float]) -> float:
        return statistics.median(of(transfer) for transfer in way)

    ratios = [run[2].gigabytes_per_second / run[1].gigabytes_per_second for run in runs]
    return {
        "shape": asdict(shape),
        "payload_bytes": by_way[2][0].payload_bytes,
        "repeats": len(runs),
        "ways": {
            way[0].way: {
                "gigabytes_per_second": median(way, lambda t: t.gigabytes_per_second),
                "receiver_cpu_seconds_per_gigabyte": median(
                    way, lambda t: t.cpu_seconds_per_gigabyte
                ),
            }
            for way in by_way
        },
        "handoff_over_stream": statistics.median(ratios),
        "handoff_over_stream_lowest": min(ratios),
    }


def _print(console: Console, report: dict[str, object], results: list[dict[str, object]]) -> None:
    console.print(f"[bold]hand-off[/bold], loopback; {report['machine']}", highlight=False)
    table = Table(box=None, pad_edge=False)
    for column in ("shape", "way", "GB/s", "receiver CPU s/GB", "of the stream"):
        table.add_column(column, justify="left" if column in ("shape", "way") else "right")
    for result in results:
        ways = result["ways"]
        assert isinstance(ways, dict)
        for way, figures in ways.items():
            rate = figures["gigabytes_per_second"]
            ratio = rate / ways["stream"]["gigabytes_per_second"]
            if way == "hand-off":
                assert isinstance(result["handoff_over_stream"], float)
                ratio = result["handoff_over_stream"]
            shape = result["shape"]
            assert isinstance(shape, dict)
            table.add_row(
                f"{shape['name']}, {shape['num_tokens']:,} tokens",
                way,
                f"{rate:.2f}",
                f"{figures['receiver_cpu_seconds_per_gigabyte']:.2f}",
                f"{ratio:.2f}",
            )
    console.print(table)
