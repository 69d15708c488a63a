"""Speed of KV from one process to another on loopback, and what it costs both of them.

Ways, in turns in one run, each with its sender in a process of its own:

    raw            TCP sockets read into hot buffers, thrown away: what the machine can do
    stream         a bare gRPC stream of the same messages, thrown away: what Python gRPC can do
    grpc           the hand-off over the call's own stream
    sockets        the hand-off over TCP connections beside the call
    tls            the same, encrypted
    shared_memory  the hand-off over a ring of memory that both processes have mapped

All send the same frames, made before the clock starts, and the four hand-offs end alike: frames
are checked by CRC32C and by their rules, KV lies in a host KV store, digests are built. So this
measures the way and both ends of it, not the prefill. It is compared with raw sockets of as many
connections, in the same round.

Here: shapes, ways, medians and the table. The ways themselves need gRPC, which only services may
import: services/cli/handoff_bench.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from statistics import median

from rich.console import Console
from rich.table import Table

from fluxion_core.errors import ConfigError
from fluxion_core.geometry import KvGeometry, ceil_div
from fluxion_core.kvstream.handoff import KvLayout
from fluxion_core.lab.benchmark.report import describe_machine
from fluxion_core.lab.provenance import Provenance

RAW = "raw"
ON_ONE_CONNECTION = ("stream", "grpc")
BESIDE_THE_CALL = ("sockets", "tls", "shared_memory")
WAYS = (*ON_ONE_CONNECTION, *BESIDE_THE_CALL)
"""Raw sockets are measured with any of them."""


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

    @property
    def payload_bytes(self) -> int:
        """KV of the whole prompt; its last block is whole."""
        return self.num_layers * self.layout.payload_bytes(self.num_tokens)


SHAPES = (
    Shape("SmolLM2-135M", num_layers=30, num_kv_heads=3, head_dim=64, num_tokens=7000),
    Shape("Llama-3.1-8B", num_layers=32, num_kv_heads=8, head_dim=128, num_tokens=4096),
)


@dataclass(frozen=True)
class Transfer:
    """One way, one run. Seconds are from before connecting until all was taken in."""

    way: str
    connections: int
    payload_bytes: int
    seconds: float
    receiver_cpu_seconds: float
    """Of the whole process, as are the sender's."""
    sender_cpu_seconds: float

    @property
    def gigabytes_per_second(self) -> float:
        """Payload over wall-clock time."""
        return self.payload_bytes / self.seconds / 1e9


Measure = Callable[[str, int], Transfer]
"""Measures a way with so many connections."""

Sending = Callable[[Shape], AbstractContextManager[Measure]]
"""Starts a sender for a shape, for as long as the block lasts."""


@dataclass(frozen=True)
class HandoffPlan:
    """Measurements to make.

    Raises:
        ConfigError: a way is none.
    """

    ways: Sequence[str] = WAYS
    connections: Sequence[int] = (1, 2, 4, 8)
    repeats: int = 5
    """Rounds of all ways, after one that does not count."""
    shapes: Sequence[Shape] = SHAPES
    commit: str = ""
    """Of the code, where it does not lie in a repository."""

    def __post_init__(self) -> None:
        for way in self.ways:
            if way not in WAYS:
                raise ConfigError(f"way {way!r}; one of: {', '.join(WAYS)}")

    def runs(self) -> Iterator[tuple[str, int]]:
        """Ways and connections of one round: raw sockets just before what is compared with them."""
        on_one = [way for way in self.ways if way in ON_ONE_CONNECTION]
        beside = [way for way in self.ways if way in BESIDE_THE_CALL]
        for count in sorted({*self.connections, *([1] if on_one else [])}):
            yield RAW, count
            yield from ((way, count) for way in on_one if count == 1)
            yield from ((way, count) for way in beside if count in self.connections)


def shapes_named(names: Sequence[str], num_tokens: int | None = None) -> list[Shape]:
    """Shapes by their names, all of them for none; with prompts of another length if asked for.

    Raises:
        ConfigError: there is none of a name.
    """
    by_name = {shape.name.lower(): shape for shape in SHAPES}
    for name in names:
        if name.lower() not in by_name:
            raise ConfigError(f"shape {name!r}; one of: {', '.join(by_name)}")
    found = [by_name[name.lower()] for name in names] or list(SHAPES)
    return [replace(one, num_tokens=num_tokens or one.num_tokens) for one in found]


def run_handoff_bench(console: Console, sending: Sending, plan: HandoffPlan) -> dict[str, object]:
    """Measure all ways for every shape; print a table, return everything as plain data."""
    results: list[dict[str, object]] = []
    machine = describe_machine(plan.commit)
    console.print(f"[bold]hand-off[/bold], loopback; {machine}", highlight=False)
    for shape in plan.shapes:
        runs = list(plan.runs())
        with sending(shape) as measure:
            for way, count in runs:
                measure(way, count)
            rounds = [[measure(way, count) for way, count in runs] for _ in range(plan.repeats)]
        figures = _figures(rounds)
        _print(console, shape, figures)
        results.append(
            {
                "shape": asdict(shape),
                "payload_bytes": shape.payload_bytes,
                "repeats": plan.repeats,
                "ways": figures,
            }
        )
    about = Provenance.here(commit=plan.commit).as_json()
    return {"about": about, "machine": machine, "results": results}


def _figures(rounds: Sequence[Sequence[Transfer]]) -> list[dict[str, object]]:
    """Medians of each way and number of connections, beside raw sockets of the same round."""
    raw = [
        {one.connections: one.gigabytes_per_second for one in each if one.way == RAW}
        for each in rounds
    ]
    figures: list[dict[str, object]] = []
    for transfers in zip(*rounds, strict=True):
        first = transfers[0]
        gigabytes = first.payload_bytes / 1e9
        shares = [
            one.gigabytes_per_second / of_round[one.connections]
            for one, of_round in zip(transfers, raw, strict=True)
        ]
        figures.append(
            {
                "way": first.way,
                "connections": first.connections,
                "gigabytes_per_second": median(one.gigabytes_per_second for one in transfers),
                "of_raw": median(shares),
                "of_raw_lowest": min(shares),
                "receiver_cpu_seconds_per_gigabyte": median(
                    one.receiver_cpu_seconds / gigabytes for one in transfers
                ),
                "sender_cpu_seconds_per_gigabyte": median(
                    one.sender_cpu_seconds / gigabytes for one in transfers
                ),
            }
        )
    return figures


def _print(console: Console, shape: Shape, figures: Sequence[dict[str, object]]) -> None:
    megabytes = ceil_div(shape.payload_bytes, 10**6)
    title = f"{shape.name}, {shape.num_tokens:,} tokens, {megabytes:,} MB"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in (
        *("way", "connections", "GB/s", "of raw"),
        *("CPU s/GB: receiver", "sender"),
    ):
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in sorted(figures, key=lambda row: row["way"] != RAW):
        table.add_row(
            str(row["way"]),
            str(row["connections"]),
            *(
                f"{row[name]:.2f}"
                for name in (
                    *("gigabytes_per_second", "of_raw"),
                    *("receiver_cpu_seconds_per_gigabyte", "sender_cpu_seconds_per_gigabyte"),
                )
            ),
        )
    console.print(table)
