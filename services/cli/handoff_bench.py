"""The three ways of `fluxion bench handoff`: raw socket, bare gRPC stream, hand-off.

What they are and how they are compared: fluxion_core/lab/benchmark/handoff.py.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import grpc

from fluxion_core.config.settings import ClientSettings
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.kvstream.assembler import HandoffAssembler
from fluxion_core.kvstream.handoff import Frame, FrameKind, Header, Trailer, frame_tokens
from fluxion_core.lab.benchmark.handoff import Clock, Shape, Transfer
from fluxion_core.wire import codec
from fluxion_core.wire.channel import open_channel

_STREAM = "/bench/stream"
_BUFFER_BYTES = 1 << 20


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


@contextmanager
def sending(shape: Shape) -> Iterator[Callable[[], list[Transfer]]]:
    """A process that sends one shape's KV in all three ways, for as long as the block lasts."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send, args=(shape, theirs), daemon=True)
    process.start()
    try:
        ports: tuple[int, int] = ours.recv()
        yield lambda: asyncio.run(_receive_all(shape, ports))
    finally:
        process.terminate()
        process.join()


def _send(shape: Shape, pipe: Connection) -> None:
    """Body of the sending process."""
    asyncio.run(_serve(shape, pipe))


async def _serve(shape: Shape, pipe: Connection) -> None:
    frames = make_frames(shape)

    async def stream(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
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
    pipe.send((grpc_port, socket_port))
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
        clock = Clock()
        received = 0
        while count := connection.recv_into(buffer):
            received += count
    return clock.transfer("socket", received)


async def _receive_stream(channel: grpc.aio.Channel) -> Transfer:
    clock = Clock()
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
    clock = Clock()
    async for message in channel.unary_stream(_STREAM)(b""):
        codec.take_message(assembler, message)
    assembler.finish()
    sequence.commit()
    return clock.transfer("hand-off", assembler.payload_bytes)
