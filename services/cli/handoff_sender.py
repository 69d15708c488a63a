"""The sending process of `fluxion bench handoff`: KV of one shape, by the way that it is asked for.

It is asked over a pipe: (way, connections) is answered by the address to connect to, and None, once
all has been taken in, by the processor time of this process meanwhile. A failure is answered by its
text.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import grpc
import numpy as np
import numpy.typing as npt

from fluxion_core.errors import FluxionError, StreamTruncatedError
from fluxion_core.kernels import _native
from fluxion_core.kernels.plane_fault import plane_error
from fluxion_core.kvstream.handoff import (
    Frame,
    FrameKind,
    Header,
    Trailer,
    frame_tokens,
    max_frame_payload_bytes,
)
from fluxion_core.lab.benchmark.handoff import BESIDE_THE_CALL, RAW, Shape
from fluxion_core.wire import codec
from fluxion_core.wire.frame_limits import PREFIX_BYTES
from services.prefill.departures import RING_SLOTS

STREAM = "/bench/stream"
TRANSPORTS = {"sockets": "plain", "tls": "tls", "shared_memory": "ring"}
"""Native transport of each way beside the call."""
KEY, IDENTITY = bytes(range(32)), bytes(range(16))
"""Secret and id of a call that was never made."""
ACCEPT_SECONDS = 30.0

_FINISH_SECONDS = 10.0

Address = int | bytes
"""A port of 127.0.0.1, or the name of an abstract Unix socket."""


def send_kv(shape: Shape, threads: int, pipe: Connection) -> None:
    """Body of the process; runs until the pipe's other end is closed.

    Args:
        shape: whose KV is sent.
        threads: that move what goes beside a call.
        pipe: see above.
    """
    io_threads = _native.IoThreads(threads)
    sender = KvSender(shape, io_threads)
    try:
        while True:
            way, connections = pipe.recv()
            with _failures_told(pipe), sender.sending(way, connections, pipe):
                assert pipe.recv() is None
    except EOFError:
        return
    finally:
        io_threads.close()


@contextmanager
def _failures_told(pipe: Connection) -> Iterator[None]:
    try:
        yield
    except (FluxionError, OSError) as error:
        pipe.send(f"the sender failed: {error}")


class KvSender:
    """KV of one prompt in memory, and the ways that it leaves by.

    Args:
        shape: whose KV it is.
        io_threads: move what goes beside a call.
    """

    def __init__(self, shape: Shape, io_threads: _native.IoThreads) -> None:
        self._shape, self._io_threads = shape, io_threads
        self._chunks = make_chunks(shape)
        self._grpc_port: int | None = None

    @contextmanager
    def sending(self, way: str, connections: int, pipe: Connection) -> Iterator[None]:
        """Tell the address, and send to who connects there; at the end, tell the processor time."""
        if way == RAW:
            body = self._sending_raw(connections, pipe)
        elif way in BESIDE_THE_CALL:
            body = self._sending_beside(way, connections, pipe)
        else:
            body = self._streaming(pipe)
        started = time.process_time()
        with body:
            yield
            used = time.process_time() - started
        pipe.send(used)

    @contextmanager
    def _sending_raw(self, connections: int, pipe: Connection) -> Iterator[None]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            pipe.send(server.getsockname()[1])
            links = accepted(server, connections)
        threads = [
            threading.Thread(target=self._send_raw, args=(link, number, connections))
            for number, link in enumerate(links)
        ]
        for thread in threads:
            thread.start()
        yield
        for thread in threads:
            thread.join()

    def _send_raw(self, link: socket.socket, connection: int, of: int) -> None:
        prefix = bytes(PREFIX_BYTES)
        with link:
            for chunk, payload in self._chunks:
                if chunk.layer % of == connection:
                    link.sendall(prefix)
                    link.sendall(payload.data)

    @contextmanager
    def _sending_beside(self, way: str, connections: int, pipe: Connection) -> Iterator[None]:
        transport = TRANSPORTS[way]
        with listening(transport) as server:
            name = server.getsockname()
            pipe.send(name if transport == "ring" else name[1])
            links = accepted(server, connections)
        event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        departure = _native.KvDeparture(
            self._io_threads,
            event_fd=event_fd,
            slots=RING_SLOTS,
            slot_bytes=max_frame_payload_bytes(self._shape.geometry),
        )
        try:
            for number, link in enumerate(links):
                link.setblocking(False)
                departure.add(link.detach(), transport, number, connections, KEY, IDENTITY)
            for chunk, payload in self._chunks:
                departure.put(
                    chunk.layer, chunk.first_token, chunk.num_tokens, payload, len(payload)
                )
            yield
            wait_until_finished(departure, len(self._chunks))
        finally:
            departure.close()
            os.close(event_fd)

    @contextmanager
    def _streaming(self, pipe: Connection) -> Iterator[None]:
        if self._grpc_port is None:
            self._grpc_port = serve_messages(make_messages(self._shape, self._chunks))
        pipe.send(self._grpc_port)
        yield


Chunk = tuple[Frame, npt.NDArray[np.uint8]]
"""A frame without its payload, and that."""


def make_chunks(shape: Shape) -> list[Chunk]:
    """A prompt's KV in the order in which it is computed; every payload has memory of its own."""
    layout, step = shape.layout, frame_tokens(shape.geometry)
    # Finite numbers, whichever way they are cut into pairs of bytes.
    pattern = np.resize(np.arange(1, 126, dtype=np.uint8), layout.payload_bytes(step))
    chunks = []
    for first in range(0, shape.num_tokens, step):
        count = min(step, shape.num_tokens - first)
        for layer in range(shape.num_layers):
            frame = Frame(FrameKind.CHUNK, b"", layer, first, count)
            chunks.append((frame, pattern[: layout.payload_bytes(count)].copy()))
    return chunks


def make_messages(shape: Shape, chunks: list[Chunk]) -> list[bytes]:
    """A whole hand-off over a call, encoded."""
    frames = [codec.header_frame(Header(shape.layout, shape.num_tokens, 0))]
    frames += [
        Frame(FrameKind.CHUNK, payload.tobytes(), one.layer, one.first_token, one.num_tokens)
        for one, payload in chunks
    ]
    trailer = Trailer(0, 0.0, 0.0, len(chunks), sum(len(payload) for _, payload in chunks))
    return [codec.encode_frame(frame) for frame in (*frames, codec.trailer_frame(trailer))]


def serve_messages(messages: list[bytes]) -> int:
    """Serve them as the answer of a method, on a thread of its own as long as the process lives.

    Returns:
        the port.
    """
    ports: list[int] = []
    is_up = threading.Event()

    async def stream(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        del request, context
        for message in messages:
            yield message

    async def serve() -> None:
        server = grpc.aio.server(options=[("grpc.max_send_message_length", 8 << 20)])
        handlers = {"stream": grpc.unary_stream_rpc_method_handler(stream)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", handlers),))
        ports.append(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        is_up.set()
        await server.wait_for_termination()

    threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
    is_up.wait()
    return ports[0]


def listening(transport: str) -> socket.socket:
    """A listener for a transport: of TCP on loopback, or of an abstract Unix name."""
    if transport != "ring":
        return socket.create_server(("127.0.0.1", 0))
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Linux chooses a name that is free.
    server.bind("")
    server.listen(16)
    return server


def accepted(server: socket.socket, count: int) -> list[socket.socket]:
    """Connections in the order in which they were made."""
    server.settimeout(ACCEPT_SECONDS)
    links = [server.accept()[0] for _ in range(count)]
    for link in links:
        if link.family == socket.AF_INET:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return links


def wait_until_finished(departure: _native.KvDeparture, count: int) -> None:
    """Wait until all frames have left; the receiver has them already.

    Raises:
        FluxionError: something was wrong, or frames are left.
    """
    finished, until = 0, time.monotonic() + _FINISH_SECONDS
    while finished < count:
        numbers, _, _, fault = departure.state()
        finished += len(numbers)
        if fault is not None and finished < count:
            raise plane_error(fault)
        if time.monotonic() > until:
            raise StreamTruncatedError(f"{count - finished} of {count} frames have not left")
        time.sleep(0.001)
