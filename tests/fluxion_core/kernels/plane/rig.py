"""Both ends of a hand-off's connections in one process, and a prompt's KV in its own store."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry
from fluxion_core.kernels import _native
from fluxion_core.kernels.isa import native_layout
from fluxion_core.kernels.plane_fault import plane_error
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.kvstream.handoff import Frame, FrameKind, KvLayout
from fluxion_core.wire import codec

GEOMETRY = KvGeometry(num_layers=3, num_kv_heads=2, head_dim=16, slab_tokens=128)
PREFIX = struct.Struct("<IHHIIIIII")
PATIENCE_SECONDS = 20.0
"""Of a test that would otherwise hang."""


def kv_layout(geometry: KvGeometry) -> KvLayout:
    """The wire's layout of a geometry."""
    shape = geometry.num_layers, geometry.num_kv_heads, geometry.head_dim
    return KvLayout("toy", "ab12", *shape, rope_theta=1e4, tokenizer_fingerprint="cd34")


@dataclass
class Prompt:
    """A prompt's place in a store, with none of its KV yet."""

    store: HostKvStore
    sequence: SequenceKv

    @property
    def slab_bytes(self) -> list[bytes]:
        """All that its slabs hold, digests included."""
        geometry = self.store.geometry
        return [
            np.ctypeslib.as_array(
                (np.ctypeslib.ctypes.c_uint8 * geometry.slab_bytes).from_address(
                    self.store.slab_address(slab)
                )
            ).tobytes()
            for slab in self.sequence.slabs
        ]


def make_prompt(num_tokens: int, geometry: KvGeometry = GEOMETRY) -> Prompt:
    """Slabs of zeros for a prompt of so many tokens."""
    slabs = geometry.slabs_for(num_tokens)
    store = HostKvStore(geometry, slabs * (geometry.slab_bytes + 4096), model_key=b"toy")
    sequence = store.reserve(range(num_tokens), 0)
    sequence.grow_for_prompt()
    return Prompt(store, sequence)


def make_frames(
    num_tokens: int,
    geometry: KvGeometry = GEOMETRY,
    *,
    kv_from_token: int = 0,
    frame_tokens: int = 48,
    seed: int = 0,
) -> list[Frame]:
    """Random KV of all layers, layers interleaved; what fills up the last block is not zeros."""
    generator = torch.Generator().manual_seed(seed)
    frames = []
    for first in range(kv_from_token, num_tokens, frame_tokens):
        count = min(frame_tokens, num_tokens - first)
        blocks = -(-count // BLOCK_TOKENS)
        shape = (geometry.num_kv_heads, blocks, 2, BLOCK_TOKENS, geometry.head_dim)
        for layer in range(geometry.num_layers):
            kv = torch.randn(shape, generator=generator).bfloat16()
            payload = kv.view(torch.uint8).numpy().tobytes()
            frames.append(Frame(FrameKind.CHUNK, payload, layer, first, count))
    return frames


def stream_of(frames: list[Frame], connection: int, of: int) -> bytes:
    """What a connection carries."""
    mine = [frame for frame in frames if frame.layer % of == connection]
    return b"".join(codec.encode_frame(frame) for frame in mine)


class Eventfd:
    """An eventfd, and waiting for what it announces."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def wait_until(self, has_come: Callable[[], bool]) -> None:
        """Look whenever the descriptor says so."""
        while not has_come():
            ready, _, _ = select.select([self.fd], [], [], PATIENCE_SECONDS)
            assert ready, "nothing was announced"
            os.eventfd_read(self.fd)

    def watch_until(self, has_come: Callable[[], bool]) -> None:
        """Look all the time, for what is not announced."""
        until = time.monotonic() + PATIENCE_SECONDS
        while not has_come():
            assert time.monotonic() < until, "it did not come"

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self.fd)


class Landing:
    """A landing into a prompt's slabs."""

    def __init__(
        self, threads: _native.IoThreads, prompt: Prompt, *, kv_from_token: int = 0
    ) -> None:
        self.event = Eventfd()
        self.prompt = prompt
        """Its slabs must stay."""
        self.native = _native.KvLanding(
            threads,
            native_layout(prompt.store.geometry),
            slabs=prompt.sequence.slab_table.numpy(),
            num_tokens=prompt.sequence.num_prompt_tokens,
            kv_from_token=kv_from_token,
            event_fd=self.event.fd,
        )

    def add(self, connection: int, of: int, transport: str = "plain") -> socket.socket:
        """Begin a connection; returns the other end, which blocks."""
        ours, theirs = socket.socketpair()
        try:
            self.native.add(ours.detach(), transport, connection, of)
        except BaseException:
            theirs.close()
            raise
        return theirs

    def feed(self, connection: int, of: int, data: bytes) -> None:
        """A connection on which all has come, and which has ended, before it is looked at."""
        ours, theirs = socket.socketpair()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        with theirs:
            theirs.setblocking(False)
            assert theirs.send(data) == len(data), "too much for the socket's buffer"
        self.native.add(ours.detach(), "plain", connection, of)

    @property
    def error(self) -> Exception | None:
        """What was wrong first."""
        fault = self.native.state()[5]
        return None if fault is None else plane_error(fault)

    @property
    def is_whole(self) -> bool:
        """Whether every layer is."""
        return self.native.state()[4]

    def wait(self) -> None:
        """Until it is whole; raises what was wrong."""
        self.event.wait_until(lambda: self.is_whole or self.error is not None)
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """End it, then its eventfd."""
        self.native.close()
        self.event.close()


class Departure:
    """A departure of frames, whose payloads it keeps until they are finished."""

    def __init__(self, threads: _native.IoThreads, slots: int = 0, slot_bytes: int = 0) -> None:
        self.event = Eventfd()
        self.kept: dict[int, np.ndarray] = {}
        self.finished: list[int] = []
        self.native = _native.KvDeparture(
            threads, event_fd=self.event.fd, slots=slots, slot_bytes=slot_bytes
        )

    def put(self, frame: Frame) -> int:
        """Let a frame leave; returns its number."""
        payload = np.frombuffer(frame.payload, np.uint8)
        number = self.native.put(
            frame.layer, frame.first_token, frame.num_tokens, payload, len(payload)
        )
        self.kept[number] = payload
        return number

    def look(self) -> tuple[int, float, Exception | None]:
        """Bytes that left, seconds since anything moved, what was wrong."""
        finished, payload_bytes, waiting_seconds, fault = self.native.state()
        for number in finished:
            del self.kept[number]
        self.finished += finished
        return payload_bytes, waiting_seconds, None if fault is None else plane_error(fault)

    def wait(self, count: int) -> None:
        """Until so many frames are finished; raises what was wrong."""

        def has_come() -> bool:
            error = self.look()[2]
            if error is not None:
                raise error
            return len(self.finished) >= count

        self.event.wait_until(has_come)

    def close(self) -> None:
        """End it, then its eventfd."""
        self.native.close()
        self.event.close()


@contextmanager
def io_threads(count: int = 1) -> Iterator[_native.IoThreads]:
    """Threads for the time of a test."""
    threads = _native.IoThreads(count)
    try:
        yield threads
    finally:
        threads.close()


@contextmanager
def landing_into(prompt: Prompt, *, kv_from_token: int = 0, threads: int = 1) -> Iterator[Landing]:
    """A landing with threads of its own."""
    with io_threads(threads) as running:
        landing = Landing(running, prompt, kv_from_token=kv_from_token)
        try:
            yield landing
        finally:
            landing.close()
