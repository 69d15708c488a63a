"""The other end of a ring in Python, which may do what ours would not."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from fluxion_core.kvstream.handoff import Frame
from fluxion_core.wire import codec
from tests.fluxion_core.kernels.plane.rig import (
    PREFIX,
    Departure,
    io_threads,
)

SLOTS, SLOT_BYTES = 4, 8192
ANNOUNCEMENT = struct.Struct("<4sIII")
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def announcement(
    *, magic: bytes = b"FUXM", slots: int = SLOTS, slot_bytes: int = SLOT_BYTES, zero: int = 0
) -> bytes:
    """What a sender says of its memory."""
    return ANNOUNCEMENT.pack(magic, slots, slot_bytes, zero)


def shared_file(size: int = SLOTS * SLOT_BYTES, seals: int = SEALS) -> int:
    """A descriptor of memory."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def prefix_of(frame: Frame, slot: int, **changed: int) -> bytes:
    """The prefix of a frame whose payload lies in a slot."""
    names = "magic version kind layer first_token num_tokens payload_bytes crc32c reserved"
    fields = PREFIX.unpack_from(codec.encode_frame(frame))
    said = dict(zip(names.split(), fields, strict=True)) | {"reserved": slot} | changed
    return PREFIX.pack(*said.values())


class Sender:
    """A sender in Python, which may do what ours would not."""

    def __init__(self, peer: socket.socket, slots: int = SLOTS) -> None:
        self.peer = peer
        file = shared_file(slots * SLOT_BYTES)
        self.memory = mmap.mmap(file, slots * SLOT_BYTES)
        socket.send_fds(peer, [announcement(slots=slots)], [file])
        os.close(file)

    def send(self, frame: Frame, slot: int, **changed: int) -> None:
        """A payload into a slot, and the frame's prefix."""
        at = slot * SLOT_BYTES
        self.memory[at : at + len(frame.payload)] = bytes(frame.payload)
        self.peer.sendall(prefix_of(frame, slot, **changed))

    def take_answer(self) -> int:
        """A slot that the receiver gives back."""
        return int.from_bytes(self.peer.recv(4, socket.MSG_WAITALL), "little")


class Receiver:
    """A receiver in Python, likewise."""

    def __init__(self, peer: socket.socket) -> None:
        self.peer = peer
        said, files, _, _ = socket.recv_fds(peer, ANNOUNCEMENT.size, 4)
        self.announcement = ANNOUNCEMENT.unpack(said)
        (self.file,) = files
        self.memory = mmap.mmap(self.file, 0, prot=mmap.PROT_READ)

    def take_prefix(self) -> tuple[int, ...]:
        """The next frame's."""
        return PREFIX.unpack(self.peer.recv(PREFIX.size, socket.MSG_WAITALL))

    def payload(self, prefix: tuple[int, ...]) -> bytes:
        """What lies in its slot."""
        at = prefix[8] * self.announcement[2]
        return self.memory[at : at + prefix[6]]

    def answer(self, slot: int) -> None:
        """Give a slot back."""
        self.peer.sendall(struct.pack("<I", slot))

    def close(self) -> None:
        """Of the descriptor and the memory; the socket is its owner's."""
        self.memory.close()
        os.close(self.file)


@contextmanager
def departure_to_python(slots: int = 2) -> Iterator[tuple[Departure, Receiver]]:
    """Our departure, and a receiver in Python."""
    with io_threads() as threads:
        departure = Departure(threads, slots=slots, slot_bytes=8000)
        ours, theirs = socket.socketpair()
        departure.native.add(ours.detach(), "ring", 0, 1)
        receiver = Receiver(theirs)
        try:
            with theirs:
                yield departure, receiver
        finally:
            receiver.close()
            departure.close()
