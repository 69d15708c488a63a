"""Frames of the data plane, damaged, into slabs between pages that nobody may touch.

What must hold: frames are taken in as the gRPC stream's receiver takes them, up to the first one
that is wrong, which is refused by name. Nothing else is written; a write outside of a slab ends the
process.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import socket
import struct
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

import google_crc32c
import numpy as np

from fluxion_core.errors import NonFiniteKvError
from fluxion_core.geometry import BLOCK_TOKENS
from fluxion_core.kernels import _native
from fluxion_core.kernels.isa import native_layout
from fluxion_core.kernels.plane_fault import plane_error
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.kvstream.handoff import Frame, FrameKind
from fluxion_core.wire import codec
from fluxion_core.wire.frame_limits import MAX_FRAME_PAYLOAD_BYTES
from tests.fuzz.handoff_streams import (
    GEOMETRY,
    LAYOUT,
    finite_noise,
    rebuilt,
    with_not_finite,
    with_odd_field,
)
from tests.fuzz.harness import Outcome, ViolationError
from tests.fuzz.mutate import mutate_bytes, odd_integer

_PREFIX = struct.Struct("<IHHIIIIII")
_LENGTHS = (1, 15, 16, 17, 31, 64, 100, 127, 128, 129, 200, 256, 300)
_MOST_SLABS = 3
_SLOT_BYTES = 16 << 10
_MARK = 0xA5
_CHUNK = 2


class GuardedSlabs:
    """Slabs of which each ends where a page begins that can be neither read nor written."""

    def __init__(self, count: int, slab_bytes: int) -> None:
        assert slab_bytes % 64 == 0
        page = mmap.PAGESIZE
        room = -(-slab_bytes // page) * page
        self._slab_bytes, self._slack = slab_bytes, room - slab_bytes
        self._memory = mmap.mmap(-1, page + count * (room + page))
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        libc = ctypes.CDLL(None, use_errno=True)
        self.forbidden = base
        """Address of a page that may not be touched."""
        self.addresses: list[int] = []
        for index in range(count + 1):
            guard = base + index * (room + page)
            if libc.mprotect(ctypes.c_void_p(guard), page, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
            if index < count:
                self.addresses.append(guard + page + self._slack)
                ctypes.memset(guard + page, _MARK, self._slack)

    def clear(self) -> None:
        """Zeros everywhere."""
        for address in self.addresses:
            ctypes.memset(address, 0, self._slab_bytes)

    def content(self, index: int) -> bytes:
        """All bytes of a slab."""
        return ctypes.string_at(self.addresses[index], self._slab_bytes)

    def check_slack(self) -> None:
        """What lies between a guard's end and its slab is as it was."""
        for address in self.addresses:
            if ctypes.string_at(address - self._slack, self._slack) != bytes([_MARK]) * self._slack:
                raise ViolationError("something was written in front of a slab")


class Verdict(NamedTuple):
    """How a connection must end."""

    refusal: str | None
    """Name of the error; None if all its layers are whole."""
    is_late: bool
    """It is refused for what comes after its last frame, which may not be there yet."""
    num_frames: int
    """Taken in before that."""


class Wire(NamedTuple):
    """What is to come over one connection."""

    data: bytes
    slots: list[bytes] | None
    """Payloads beside the stream."""


class PlaneFrames:
    """Frames of whole prompts with a few changes; every tenth has none and must be accepted."""

    name = "plane"
    unit = "frames"

    def __init__(self) -> None:
        self._noise = finite_noise(1 << 16)
        self._store = HostKvStore(GEOMETRY, 1 << 20, model_key=b"toy")
        self._slabs = GuardedSlabs(_MOST_SLABS, GEOMETRY.slab_bytes)
        self._threads = _native.IoThreads(2)

    def close(self) -> None:
        """End the threads."""
        self._threads.close()

    def run(self, random: Random) -> Outcome:
        """The connections of one prompt into one landing."""
        num_tokens = random.choice(_LENGTHS)
        start = BLOCK_TOKENS * random.choice((0, 0, random.randrange(-(-num_tokens // 16))))
        of = random.choice((1, 1, 1, 2, 3))
        is_damaged = random.random() < 0.9
        frames = list(whole_frames(random, num_tokens, start, self._noise))
        streams = [[m for layer, m in frames if layer % of == number] for number in range(of)]
        if is_damaged:
            for _ in range(random.choice((1, 1, 1, 2, 3))):
                damage(random, streams)
        has_slots = random.random() < 0.3
        wires = [make_wire(random, stream, has_slots=has_slots) for stream in streams]
        if is_damaged and random.random() < 0.2:
            at = random.randrange(of)
            wires[at] = wires[at]._replace(data=mutate_bytes(random, wires[at].data))
        self._slabs.clear()
        sequence = self._reserve(num_tokens, start)
        try:
            verdicts = [judge(sequence, wire, number, of) for number, wire in enumerate(wires)]
            result = self._land(random, sequence, wires)
            self._check(sequence, verdicts, result)
        finally:
            sequence.release()
        taken = sum(verdict.num_frames + (verdict.refusal is not None) for verdict in verdicts)
        return Outcome(result or "accepted", taken, sum(len(wire.data) for wire in wires))

    def _reserve(self, num_tokens: int, start: int) -> SequenceKv:
        """The oracle's place, of zeros, of a prompt whose first tokens are stored."""
        sequence = self._store.reserve(range(num_tokens), 0, domain=str(start))
        sequence.grow_for_prompt()
        for slab in sequence.slabs:
            ctypes.memset(self._store.slab_address(slab), 0, GEOMETRY.slab_bytes)
        sequence.shared_tokens = start
        sequence.restart()
        return sequence

    def _land(self, random: Random, sequence: SequenceKv, wires: list[Wire]) -> str | None:
        """Let it come; returns the name of what was wrong."""
        first_slab = sequence.kv_from_token // GEOMETRY.slab_tokens
        slabs = np.array(self._slabs.addresses[: len(sequence.slabs)], np.int64)
        slabs[:first_slab] = self._slabs.forbidden
        event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        landing = _native.KvLanding(
            self._threads,
            native_layout(GEOMETRY),
            slabs=slabs,
            num_tokens=sequence.num_prompt_tokens,
            kv_from_token=sequence.kv_from_token,
            event_fd=event,
        )
        peers: list[socket.socket] = []
        try:
            for number, wire in enumerate(wires):
                ours, theirs = socket.socketpair()
                peers.append(theirs)
                announce_slots(theirs, wire.slots)
                is_early = random.random() < 0.7
                if is_early:
                    send(random, theirs, wire.data)
                transport = "plain" if wire.slots is None else "ring"
                landing.add(ours.detach(), transport, number, len(wires))
                if not is_early:
                    send(random, theirs, wire.data)
            while True:
                *_, is_whole, fault = landing.state()
                if is_whole or fault:
                    return None if fault is None else type(plane_error(fault)).__name__
                if not select.select([event], [], [], 30.0)[0]:
                    raise ViolationError("it neither ends nor goes on")
                os.eventfd_read(event)
        finally:
            landing.close()
            os.close(event)
            for peer in peers:
                peer.close()

    def _check(self, sequence: SequenceKv, verdicts: list[Verdict], result: str | None) -> None:
        """It ended as it must, and the slabs hold what the oracle's do."""
        self._slabs.check_slack()
        refusals = {verdict.refusal for verdict in verdicts} - {None}
        may_pass = all(verdict.refusal is None or verdict.is_late for verdict in verdicts)
        if result is None and not may_pass:
            raise ViolationError(f"accepted, but for {refusals}")
        if any(verdict.is_late for verdict in verdicts):
            refusals.add("FrameFormatError")  # of a frame that had come in part
        if result is not None and result not in refusals:
            raise ViolationError(f"refused for {result}; expected {refusals or 'nothing'}")
        if result is not None and len(verdicts) > 1:
            return  # how far the others came is chance
        for ordinal in range(sequence.kv_from_token // GEOMETRY.slab_tokens, len(sequence.slabs)):
            address = self._store.slab_address(sequence.slabs[ordinal])
            if self._slabs.content(ordinal) != ctypes.string_at(address, GEOMETRY.slab_bytes):
                raise ViolationError(f"slab {ordinal} holds something else than was sent")


def whole_frames(
    random: Random, num_tokens: int, start: int, noise: bytes
) -> Iterator[tuple[int, bytes]]:
    """Layer and message of every frame of a prompt, a layer's in order."""
    for layer in range(LAYOUT.num_layers):
        first = start
        while first < num_tokens:
            count = min(num_tokens - first, BLOCK_TOKENS * random.randint(1, 8))
            size = LAYOUT.payload_bytes(count)
            at = 2 * random.randrange((len(noise) - size) // 2)
            frame = Frame(FrameKind.CHUNK, noise[at : at + size], layer, first, count)
            yield layer, codec.encode_frame(frame)
            first += count


def damage(random: Random, streams: list[list[bytes]]) -> None:
    """One change: to the order of frames, to where they go, to a prefix or to a payload."""
    stream = random.choice(streams)
    if not stream:
        stream.append(random.randbytes(random.randrange(100)))
        return
    at = random.randrange(len(stream))
    message = stream[at]
    match random.randrange(11):
        case 0:
            del stream[at]
        case 1:
            stream.insert(random.randint(0, len(stream)), message)
        case 2:
            other = random.randrange(len(stream))
            stream[at], stream[other] = stream[other], message
        case 3:
            del stream[at:]
        case 4:
            random.choice(streams).append(stream.pop(at))
        case 5:
            stream[at] = mutate_bytes(random, message)
        case 6:
            stream[at] = rebuilt(message, mutate_bytes(random, message[_PREFIX.size :]))
        case 7:
            stream[at] = with_not_finite(random, message)
        case _:
            stream[at] = with_odd_field(random, message)


def make_wire(random: Random, stream: list[bytes], *, has_slots: bool) -> Wire:
    """A connection's frames as bytes, or as prefixes and slots."""
    if not has_slots:
        return Wire(b"".join(stream), None)
    slots, prefixes = [], []
    for message in stream:
        *fields, reserved = _PREFIX.unpack_from(message[: _PREFIX.size].ljust(_PREFIX.size, b"\0"))
        slot = reserved or len(slots)
        if random.random() < 0.02:
            slot = odd_integer(random, 32, slot)
        prefixes.append(_PREFIX.pack(*fields, slot)[: len(message)])
        slots.append(message[_PREFIX.size :][:_SLOT_BYTES].ljust(_SLOT_BYTES, b"\0"))
    return Wire(b"".join(prefixes), slots or [bytes(_SLOT_BYTES)])


def announce_slots(peer: socket.socket, slots: list[bytes] | None) -> None:
    """Hand the memory of a ring over."""
    if slots is None:
        return
    file = os.memfd_create("slots", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(file, b"".join(slots))
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
        said = struct.pack("<4sIII", b"FUXM", len(slots), _SLOT_BYTES, 0)
        socket.send_fds(peer, [said], [file])
    finally:
        os.close(file)


def send(random: Random, peer: socket.socket, data: bytes) -> None:
    """All at once or in pieces, then the end; the receiver may close before."""
    try:
        at = 0
        while at < len(data):
            count = len(data) if random.random() < 0.5 else random.randint(1, 5000)
            peer.sendall(data[at : at + count])
            at += count
        peer.shutdown(socket.SHUT_WR)
    except (BrokenPipeError, ConnectionResetError):
        return


def judge(sequence: SequenceKv, wire: Wire, connection: int, of: int) -> Verdict:
    """How a connection must end, and its frames into the oracle up to there."""
    layers = range(connection, GEOMETRY.num_layers, of)
    next_token = dict.fromkeys(layers, sequence.kv_from_token)
    rest, num_frames = wire.data, 0
    while True:
        is_whole = all(token == sequence.num_prompt_tokens for token in next_token.values())
        if is_whole and not rest:
            return Verdict(None, False, num_frames)
        if len(rest) < _PREFIX.size:
            refusal = "FrameFormatError" if is_whole else "StreamTruncatedError"
            return Verdict(refusal, is_whole, num_frames)
        fields = _PREFIX.unpack_from(rest)
        layer, first, count, size, crc, slot = fields[3:]
        refusal = refusal_of(fields, wire.slots, next_token, sequence.num_prompt_tokens)
        if refusal:
            return Verdict(refusal, is_whole, num_frames)
        rest = rest[_PREFIX.size :]
        if wire.slots is not None:
            payload = wire.slots[slot][:size]
        elif len(rest) < size:
            return Verdict("StreamTruncatedError", False, num_frames)
        else:
            payload, rest = rest[:size], rest[size:]
        if google_crc32c.value(payload) != crc:
            return Verdict("FrameChecksumError", False, num_frames)
        try:
            sequence.write_blocks(layer, first, count, payload)
        except NonFiniteKvError:
            return Verdict("NonFiniteKvError", False, num_frames)
        next_token[layer] = first + count
        num_frames += 1


def refusal_of(
    fields: tuple[int, ...], slots: list[bytes] | None, next_token: dict[int, int], num_tokens: int
) -> str | None:
    """What is wrong with a prefix, by the specification."""
    magic, version, kind, layer, first, count, size, _, reserved = fields
    if (magic, version, kind) != (codec.MAGIC, codec.VERSION, _CHUNK):
        return "FrameFormatError"
    if (slots is None and reserved) or size > MAX_FRAME_PAYLOAD_BYTES or layer not in next_token:
        return "FrameFormatError"
    if first != next_token[layer]:
        return "FrameOrderError"
    end = first + count
    if not first < end <= num_tokens or (count % BLOCK_TOKENS and end != num_tokens):
        return "FrameFormatError"
    if size != LAYOUT.payload_bytes(count):
        return "FrameFormatError"
    if slots is not None and (reserved >= len(slots) or size > _SLOT_BYTES):
        return "FrameFormatError"
    return None
