"""How fast KV crosses from one process to another, and what it costs the receiver.

Three ways, interleaved in one run, each with its sender in a process of its own, on loopback:

    socket    a raw TCP socket into a preallocated buffer: what the machine can do
    stream    a bare gRPC stream of the same messages, thrown away: what Python gRPC can do
    hand-off  our frames with CRC32C, checked, copied into a host KV store, digests built

The hand-off is to reach at least 0.8 of the stream. All three send the same frames, made before the
clock starts: this measures the way and the receiver, not the prefill.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import platform
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import grpc
from rich.console import Console
from rich.table import Table

from fluxion_core.config import ClientSettings
from fluxion_core.geometry import KvGeometry
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.kvstream.assembler import HandoffAssembler
from fluxion_core.kvstream.handoff import (
    Frame,
    FrameKind,
    Header,
    KvLayout,
    Trailer,
    frame_tokens,
)
from fluxion_core.wire import codec
from fluxion_core.wire.channel import open_channel

_STREAM = "/bench/stream"
_BUFFER_BYTES = 1 << 20


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
        """As both ends must agree on it."""
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


def run_handoff_bench(
    console: Console, *, repeats: int = 5, shapes: tuple[Shape, ...] = SHAPES
) -> dict[str, object]:
    """Measure all ways for every shape; print a table, return everything as plain data.

    Args:
        console: where the table goes.
        repeats: interleaved runs of each way; medians are shown.
        shapes: models and prompt lengths.
    """
    results = []
    for shape in shapes:
        with _sender(shape) as ports:
            runs = [asyncio.run(_receive_all(shape, ports)) for _ in range(repeats + 1)][1:]
        results.append(_summary(shape, runs))
    report: dict[str, object] = {"machine": describe_machine(), "results": results}
    _print(console, report, results)
    return report


def describe_machine() -> dict[str, str]:
    """Processor, cores and the versions that matter here."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = f"{len(names)} x {names[0].split(':', 1)[1].strip()}" if names else model
    versions = {name: metadata.version(name) for name in ("grpcio", "protobuf", "torch")}
    return {"processor": model, "python": platform.python_version(), **versions}


def write_json(report: dict[str, object], path: Path) -> None:
    """Keep a report."""
    path.write_text(json.dumps(report, indent=2) + "\n")


def make_frames(shape: Shape) -> list[bytes]:
    """A whole hand-off of random-looking KV, encoded."""
    geometry, layout = shape.geometry, shape.layout
    step = frame_tokens(geometry)
    pattern = bytes(range(1, 126)) * (layout.payload_bytes(step) // 125 + 1)
    frames = [codec.encode_frame(codec.header_frame(Header(layout, shape.num_tokens, 0)))]
    payload_bytes = 0
    for first in range(0, shape.num_tokens, step):
        count = min(step, shape.num_tokens - first)
        payload = pattern[: layout.payload_bytes(count)]
        for layer in range(shape.num_layers):
            frames.append(codec.encode_frame(Frame(FrameKind.CHUNK, payload, layer, first, count)))
            payload_bytes += len(payload)
    trailer = Trailer(0, 0.0, 0.0, len(frames) - 1, payload_bytes)
    frames.append(codec.encode_frame(codec.trailer_frame(trailer)))
    return frames


class _sender:  # noqa: N801 - used as a context manager only
    """A process that sends one shape's KV in all three ways, for as long as the block lasts."""

    def __init__(self, shape: Shape) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_send, args=(shape, theirs), daemon=True)

    def __enter__(self) -> tuple[int, int]:
        self._process.start()
        ports: tuple[int, int] = self._ours.recv()
        return ports

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()


def _send(shape: Shape, pipe: object) -> None:
    """Body of the sending process."""
    asyncio.run(_serve(shape, pipe))


async def _serve(shape: Shape, pipe: object) -> None:
    frames = make_frames(shape)

    async def stream(request: bytes, context: object):  # type: ignore[no-untyped-def]
        del request, context
        for frame in frames:
            yield frame

    server = grpc.aio.server(options=[("grpc.max_send_message_length", 8 << 20)])
    handlers = {"stream": grpc.unary_stream_rpc_method_handler(stream)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", handlers),))
    grpc_port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def socket_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        del reader
        plain = writer.get_extra_info("socket").dup()
        plain.setblocking(True)
        await asyncio.to_thread(_send_plain, plain, frames)
        writer.close()

    plain_server = await asyncio.start_server(socket_client, "127.0.0.1", 0)
    socket_port = plain_server.sockets[0].getsockname()[1]
    pipe.send((grpc_port, socket_port))  # type: ignore[attr-defined]
    await server.wait_for_termination()


def _send_plain(plain: socket.socket, frames: list[bytes]) -> None:
    with plain:
        for frame in frames:
            plain.sendall(frame)


async def _receive_all(shape: Shape, ports: tuple[int, int]) -> list[Transfer]:
    grpc_port, socket_port = ports
    plain = await asyncio.to_thread(_receive_socket, socket_port)
    async with open_channel(f"127.0.0.1:{grpc_port}", ClientSettings()) as channel:
        await channel.channel_ready()
        stream = await _receive_stream(channel)
        handoff = await _receive_handoff(channel, shape)
    return [plain, stream, handoff]


def _receive_socket(port: int) -> Transfer:
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    with socket.create_connection(("127.0.0.1", port)) as connection:
        clock = _Clock()
        received = 0
        while count := connection.recv_into(buffer):
            received += count
    return clock.transfer("socket", received)


async def _receive_stream(channel: grpc.aio.Channel) -> Transfer:
    clock = _Clock()
    received = 0
    async for message in channel.unary_stream(_STREAM)(b""):
        received += len(message)
    return clock.transfer("stream", received)


async def _receive_handoff(channel: grpc.aio.Channel, shape: Shape) -> Transfer:
    geometry = shape.geometry
    slabs = geometry.slabs_for(shape.num_tokens)
    # Touched before the clock starts, as a store of a node that has run for a while is.
    store = HostKvStore(
        geometry, slabs * (geometry.slab_bytes + 4096), model_key=b"bench", populate=True
    )
    sequence = store.reserve(range(shape.num_tokens), 0)
    assembler = HandoffAssembler(
        sequence, shape.layout, num_tokens=shape.num_tokens, kv_from_token=0
    )
    clock = _Clock()
    async for message in channel.unary_stream(_STREAM)(b""):
        codec.take_message(assembler, message)
    assembler.finish()
    sequence.commit()
    return clock.transfer("hand-off", assembler.payload_bytes)


class _Clock:
    """Wall-clock and processor time of this process."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def transfer(self, way: str, payload_bytes: int) -> Transfer:
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
