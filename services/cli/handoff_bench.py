"""The receiving side of `fluxion bench handoff`, and its sender's process.

What the ways are and how they are compared: fluxion_core/lab/benchmark/handoff.py. The sender:
handoff_sender.py.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import select
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection

import grpc

from fluxion_core.config.settings import ClientSettings, HandoffSettings
from fluxion_core.errors import FluxionError, StreamTruncatedError
from fluxion_core.kernels import _native
from fluxion_core.kernels.isa import native_layout
from fluxion_core.kernels.plane_fault import plane_error
from fluxion_core.kvstore.sequence import LandingPlace, SequenceKv
from fluxion_core.kvstore.store import SLAB_ALIGNMENT_BYTES, HostKvStore
from fluxion_core.kvstream.assembler import HandoffAssembler
from fluxion_core.lab.benchmark.handoff import (
    BESIDE_THE_CALL,
    RAW,
    Measure,
    Sending,
    Shape,
    Transfer,
)
from fluxion_core.wire import codec
from fluxion_core.wire.channel import open_channel
from services.cli.handoff_sender import IDENTITY, KEY, STREAM, TRANSPORTS, Address, send_kv

_BUFFER_BYTES = 1 << 20
_ANSWER_SECONDS = 60.0


def sending_with(threads: int | None) -> Sending:
    """The sender for a shape, with so many native threads on both sides; as many as nodes have by
    default if None.
    """
    count = threads or HandoffSettings().num_threads

    def sending(shape: Shape) -> AbstractContextManager[Measure]:
        return _sending(shape, count)

    return sending


@contextmanager
def _sending(shape: Shape, threads: int) -> Iterator[Measure]:
    """A process that sends one shape's KV by any way, for as long as the block lasts."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=send_kv, args=(shape, threads, theirs), daemon=True)
    process.start()
    theirs.close()
    io_threads = _native.IoThreads(threads)
    try:
        yield KvReceiver(shape, io_threads, ours).measure
    finally:
        io_threads.close()
        ours.close()
        process.terminate()
        process.join()


class KvReceiver:
    """Takes a shape's KV in, and times it.

    Args:
        shape: whose KV comes.
        io_threads: take in what comes beside a call.
        pipe: to the sender.
    """

    def __init__(self, shape: Shape, io_threads: _native.IoThreads, pipe: Connection) -> None:
        geometry = shape.geometry
        slabs = geometry.slabs_for(shape.num_tokens)
        # Touched before the clock starts, as a store of a node that has run for a while is.
        self._store = HostKvStore(
            geometry,
            slabs * (geometry.slab_bytes + SLAB_ALIGNMENT_BYTES),
            model_key=b"bench",
            populate=True,
        )
        self._shape, self._io_threads, self._pipe = shape, io_threads, pipe
        self._num_prompts = 0

    def measure(self, way: str, connections: int) -> Transfer:
        """One transfer.

        Raises:
            FluxionError: it failed, or the sender did.
        """
        address = self._ask((way, connections))
        assert not isinstance(address, float)
        cpu, started = time.process_time(), time.perf_counter()
        if way == RAW:
            self._take_raw(address, connections)
        elif way in BESIDE_THE_CALL:
            self._land(TRANSPORTS[way], address, connections)
        else:
            asyncio.run(self._take_stream(way, address))
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        sender_cpu = self._ask(None)
        assert isinstance(sender_cpu, float)
        payload_bytes = self._shape.payload_bytes
        return Transfer(way, connections, payload_bytes, seconds, cpu, sender_cpu)

    def _ask(self, message: tuple[str, int] | None) -> Address | float:
        try:
            self._pipe.send(message)
            if not self._pipe.poll(_ANSWER_SECONDS):
                raise FluxionError(f"the sender has not answered for {_ANSWER_SECONDS:g} s")
            answer: Address | float | str = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise FluxionError("the sender has ended") from None
        if isinstance(answer, str):
            raise FluxionError(answer)
        return answer

    def _take_raw(self, address: Address, connections: int) -> None:
        links = [connect(address) for _ in range(connections)]
        with ThreadPoolExecutor(connections) as threads:
            received = sum(threads.map(read_to_end, links))
        if received < self._shape.payload_bytes:
            raise StreamTruncatedError(
                f"{received} B have come; {self._shape.payload_bytes} B of KV were sent"
            )

    def _land(self, transport: str, address: Address, connections: int) -> None:
        event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        sequence = self._new_sequence()
        try:
            landing = sequence.open_landing(lambda place: self._new_landing(place, event_fd))
            for number in range(connections):
                link = connect(address)
                link.setblocking(False)
                landing.add(link.detach(), transport, number, connections, KEY, IDENTITY)
            wait_until_whole(landing, event_fd)
            sequence.landed()
            sequence.commit()
        finally:
            sequence.release()
            os.close(event_fd)

    def _new_landing(self, place: LandingPlace, event_fd: int) -> _native.KvLanding:
        return _native.KvLanding(
            self._io_threads,
            native_layout(self._shape.geometry),
            slabs=place.slab_addresses,
            num_tokens=place.num_tokens,
            kv_from_token=place.kv_from_token,
            event_fd=event_fd,
        )

    async def _take_stream(self, way: str, address: Address) -> None:
        assert isinstance(address, int)
        async with open_channel(f"127.0.0.1:{address}", ClientSettings()) as channel:
            if way == "stream":
                async for _ in channel.unary_stream(STREAM)(b""):
                    pass
            else:
                await self._take_handoff(channel)

    async def _take_handoff(self, channel: grpc.aio.Channel) -> None:
        sequence = self._new_sequence()
        try:
            assembler = HandoffAssembler(
                sequence, self._shape.layout, num_tokens=self._shape.num_tokens, kv_from_token=0
            )
            async for message in channel.unary_stream(STREAM)(b""):
                codec.take_message(assembler, message)
            assembler.finish()
            sequence.commit()
        finally:
            sequence.release()

    def _new_sequence(self) -> SequenceKv:
        """A place for the prompt, of which nothing is stored: no two begin with the same token."""
        self._num_prompts += 1
        return self._store.reserve([self._num_prompts, *range(1, self._shape.num_tokens)], 0)


def connect(address: Address) -> socket.socket:
    """A connection to the sender."""
    if isinstance(address, int):
        return socket.create_connection(("127.0.0.1", address))
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    link.connect(address)
    return link


def read_to_end(link: socket.socket) -> int:
    """Bytes that come until the other side ends, read into a buffer that stays hot."""
    buffer, received = memoryview(bytearray(_BUFFER_BYTES)), 0
    with link:
        while count := link.recv_into(buffer):
            received += count
    return received


def wait_until_whole(landing: _native.KvLanding, event_fd: int) -> None:
    """Wait until a landing has everything.

    Raises:
        FluxionError: something of it was wrong, or nothing came for too long.
    """
    while True:
        *_, is_whole, fault = landing.state()
        if fault is not None:
            raise plane_error(fault)
        if is_whole:
            return
        if not select.select([event_fd], [], [], _ANSWER_SECONDS)[0]:
            raise StreamTruncatedError(f"no KV has come for {_ANSWER_SECONDS:g} s")
        os.eventfd_read(event_fd)
