"""Beside shared memory, KV lands as over a stream; memory and slots are as agreed, or refused."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from fluxion_core.errors import (
    FluxionError,
    FrameChecksumError,
    FrameFormatError,
    PeerUnavailableError,
    StreamTruncatedError,
)
from fluxion_core.kernels.crc32c.reference import crc32c
from fluxion_core.kvstream.handoff import Frame
from fluxion_core.wire import codec
from tests.fluxion_core.kernels.plane.rig import (
    PREFIX,
    Departure,
    io_threads,
    landing_into,
    make_frames,
    make_prompt,
)

FRAMES = make_frames(100)
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


def open_descriptors() -> int:
    gc.collect()  # what an earlier test left
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("slots", [1, 2, 16])
def test_what_departs_lands(slots: int):
    frames = make_frames(4096, frame_tokens=1024)
    found, expected = make_prompt(4096), make_prompt(4096)
    for frame in frames:
        expected.sequence.write_blocks(
            frame.layer, frame.first_token, frame.num_tokens, frame.payload
        )
    with io_threads() as sending, landing_into(found) as landing:
        departure = Departure(sending, slots=slots, slot_bytes=len(frames[0].payload))
        ours, theirs = socket.socketpair()
        departure.native.add(ours.detach(), "ring", 0, 1)
        landing.native.add(theirs.detach(), "ring", 0, 1)
        for frame in frames:
            departure.put(frame)
        landing.wait()
        departure.wait(len(frames))
        assert departure.look()[2] is None
        departure.close()
    assert found.slab_bytes == expected.slab_bytes


def test_both_ends_let_go_of_their_descriptors():
    with io_threads() as sending, landing_into(make_prompt(100)) as landing:
        departure = Departure(sending, slots=2, slot_bytes=8000)
        before = open_descriptors()
        ours, theirs = socket.socketpair()
        departure.native.add(ours.detach(), "ring", 0, 1)
        landing.native.add(theirs.detach(), "ring", 0, 1)
        for frame in FRAMES:
            departure.put(frame)
        landing.wait()
        departure.native.close()
        landing.native.close()
        assert open_descriptors() == before
        departure.close()


def test_the_memory_handed_over_can_change_its_size_no_more():
    with departure_to_python() as (_, receiver):
        assert receiver.announcement == (b"FUXM", 2, 8192, 0)  # slots begin on pages
        assert os.fstat(receiver.file).st_size == 2 * 8192
        seals = fcntl.fcntl(receiver.file, fcntl.F_GET_SEALS)
        assert seals == SEALS | fcntl.F_SEAL_SEAL
        for size in (0, 2 * 8192 - 1, 1 << 20):
            with pytest.raises(PermissionError):
                os.ftruncate(receiver.file, size)


@pytest.mark.parametrize("num_bytes", [1, 63, 64, 65, 4160, 8000])
def test_a_slot_holds_the_payload_that_its_prefix_is_of(num_bytes: int):
    payload = np.random.default_rng(num_bytes).integers(0, 256, num_bytes, dtype=np.uint8)
    with departure_to_python() as (departure, receiver):
        departure.native.put(3, 16, 5, payload, num_bytes)
        prefix = receiver.take_prefix()
        crc = crc32c(payload.tobytes())
        assert prefix == (0x4E585546, 1, 2, 3, 16, 5, num_bytes, crc, prefix[8])
        assert receiver.payload(prefix) == payload.tobytes()


def test_a_payload_is_finished_once_it_is_in_its_slot():
    with departure_to_python(slots=2) as (departure, receiver):
        for frame in FRAMES[:3]:
            departure.put(frame)
        departure.wait(2)
        named = [receiver.take_prefix()[8] for _ in range(2)]
        assert sorted(named) == [0, 1]
        assert departure.finished == [0, 1]
        receiver.answer(named[1])
        departure.wait(3)
        assert receiver.take_prefix()[8] == named[1]


def test_an_answer_may_come_in_parts():
    with departure_to_python(slots=1) as (departure, receiver):
        for frame in FRAMES[:2]:
            departure.put(frame)
        first = receiver.take_prefix()
        for byte in struct.pack("<I", first[8]):
            assert departure.look()[2] is None
            receiver.peer.sendall(bytes([byte]))
        assert receiver.payload(receiver.take_prefix()) == bytes(FRAMES[1].payload)


@pytest.mark.parametrize(
    "answers", [(1,), (2,), (0xFFFFFFFF,), (0, 0)], ids=["free", "none", "far", "twice"]
)
def test_a_slot_that_the_receiver_was_not_given_is_refused(answers: tuple[int, ...]):
    with departure_to_python(slots=2) as (departure, receiver):
        departure.put(FRAMES[0])
        assert receiver.take_prefix()[8] == 0
        for slot in answers:
            receiver.answer(slot)
        with pytest.raises(FrameFormatError, match=f"answers slot {answers[-1]}"):
            departure.wait(2)


@pytest.mark.parametrize(("slots", "slot_bytes"), [(0, 64), (257, 64), (1, 0), (1, (4 << 20) + 1)])
def test_a_ring_that_cannot_be_is_refused(slots: int, slot_bytes: int):
    with io_threads() as threads:
        departure = Departure(threads, slots=slots, slot_bytes=slot_bytes)
        ours, theirs = socket.socketpair()
        with theirs, pytest.raises(ValueError, match="a ring has 1 to 256 slots"):
            departure.native.add(ours.detach(), "ring", 0, 1)
        departure.close()


def test_a_sender_of_another_make_lands_alike():
    found, expected = make_prompt(100), make_prompt(100)
    for frame in FRAMES:
        expected.sequence.write_blocks(
            frame.layer, frame.first_token, frame.num_tokens, frame.payload
        )
    with landing_into(found) as landing, landing.add(0, 1, "ring") as peer:
        sender = Sender(peer)
        for number, frame in enumerate(FRAMES):
            sender.send(frame, number % SLOTS)
            assert sender.take_answer() == number % SLOTS
        landing.wait()
        assert peer.recv(1) == b""
    assert found.slab_bytes == expected.slab_bytes


def test_a_sender_that_goes_when_it_has_sent_all_is_not_missed():
    prompt = make_prompt(100)
    with landing_into(prompt) as landing:
        ours, theirs = socket.socketpair()
        with theirs:
            sender = Sender(theirs, slots=len(FRAMES))
            for slot, frame in enumerate(FRAMES):
                sender.send(frame, slot)
            ours.send(bytes(4))  # an answer that it has not read: the connection is reset
        landing.native.add(ours.detach(), "ring", 0, 1)
        landing.wait()
        assert landing.native.state()[1] == len(FRAMES)


@pytest.mark.parametrize(
    ("changed", "kind", "says"),
    [
        ({"reserved": SLOTS}, FrameFormatError, "slot 4 of 4"),
        ({"reserved": 0xFFFFFFFF}, FrameFormatError, "slot 4294967295 of 4"),
        ({"crc32c": 1}, FrameChecksumError, "layer 0"),
        ({"magic": 1}, FrameFormatError, "begins with"),
    ],
)
def test_a_frame_that_is_not_in_its_slot_is_refused(
    changed: dict[str, int], kind: type[FluxionError], says: str
):
    with landing_into(make_prompt(100)) as landing, landing.add(0, 1, "ring") as peer:
        Sender(peer).send(FRAMES[0], 1, **changed)
        with pytest.raises(kind, match=says):
            landing.wait()
        assert landing.native.state()[1] == 0


def test_a_frame_larger_than_its_slot_is_refused():
    frame = make_frames(1024, frame_tokens=1024)[0]
    with landing_into(make_prompt(1024)) as landing, landing.add(0, 1, "ring") as peer:
        Sender(peer)
        peer.sendall(prefix_of(frame, 0))
        with pytest.raises(FrameFormatError, match="131072 B in a slot of 8192"):
            landing.wait()


def test_descriptors_that_come_with_a_prefix_are_not_taken():
    with landing_into(make_prompt(100)) as landing, landing.add(0, 1, "ring") as peer:
        sender = Sender(peer)
        sender.send(FRAMES[0], 0)
        assert sender.take_answer() == 0
        before = open_descriptors()
        sender.memory[: len(FRAMES[1].payload)] = bytes(FRAMES[1].payload)
        socket.send_fds(peer, [prefix_of(FRAMES[1], 0)], [0, 1, 2])
        assert sender.take_answer() == 0
        assert open_descriptors() == before


Files = list[tuple[int, int]]
"""Bytes and seals of each."""

WHOLE = SLOTS * SLOT_BYTES
ANNOUNCED: dict[str, tuple[bytes, Files, str]] = {
    "unsealed": (announcement(), [(WHOLE, 0)], "sealed"),
    "may grow": (announcement(), [(WHOLE, fcntl.F_SEAL_SHRINK)], "sealed"),
    "may shrink": (announcement(), [(WHOLE, fcntl.F_SEAL_GROW)], "sealed"),
    "too small": (announcement(), [(WHOLE - 1, SEALS)], "32767 B"),
    "too large": (announcement(), [(1 << 20, SEALS)], "1048576 B"),
    "empty": (announcement(), [(0, SEALS)], "has 0 B"),
    "none": (announcement(), [], "0 descriptors"),
    "two": (announcement(), [(WHOLE, SEALS)] * 2, "2 descriptors"),
    "twelve": (announcement(), [(WHOLE, SEALS)] * 12, "8 descriptors"),
    "magic": (announcement(magic=b"FUXN"), [(WHOLE, SEALS)], "announcement"),
    "zero": (announcement(zero=1), [(WHOLE, SEALS)], "announcement"),
    "short": (announcement()[:15], [(WHOLE, SEALS)], "announcement"),
    "no slots": (announcement(slots=0), [(0, SEALS)], "0 slots"),
    "many slots": (announcement(slots=257), [(257 * SLOT_BYTES, SEALS)], "257 slots"),
    "no bytes": (announcement(slot_bytes=0), [(0, SEALS)], "of 0 B"),
    "odd bytes": (announcement(slot_bytes=8200), [(4 * 8200, SEALS)], "multiple of 64"),
    "large slots": (announcement(slot_bytes=(4 << 20) + 64), [(WHOLE, SEALS)], "4194368 B"),
    "around 2^64": (announcement(slots=1 << 31, slot_bytes=1 << 31), [(0, SEALS)], "slots of"),
}


@pytest.mark.parametrize("name", ANNOUNCED)
def test_memory_that_is_not_as_agreed_is_refused(name: str):
    said, sizes, says = ANNOUNCED[name]
    with landing_into(make_prompt(100)) as landing:
        before = open_descriptors()
        with landing.add(0, 1, "ring") as peer:
            files = [shared_file(*each) for each in sizes]
            socket.send_fds(peer, [said], files)
            for file in files:
                os.close(file)
            with pytest.raises(FrameFormatError, match=says):
                landing.wait()
        landing.native.close()
        assert open_descriptors() == before


@pytest.mark.parametrize("kind", ["pipe", "socket", "file", "folder"])
def test_a_descriptor_of_something_else_is_refused(kind: str):
    with tempfile.TemporaryFile() as file, socket.socket() as unbound:
        file.truncate(WHOLE)
        reading, writing = os.pipe()
        folder = os.open("/", os.O_RDONLY)
        offered = {
            "pipe": reading,
            "socket": unbound.fileno(),
            "file": file.fileno(),
            "folder": folder,
        }
        with landing_into(make_prompt(100)) as landing, landing.add(0, 1, "ring") as peer:
            socket.send_fds(peer, [announcement()], [offered[kind]])
            with pytest.raises(FrameFormatError, match="sealed"):
                landing.wait()
        for fd in (reading, writing, folder):
            os.close(fd)


def test_a_peer_that_ends_before_its_memory_came_is_truncated():
    with landing_into(make_prompt(100)) as landing:
        landing.add(0, 1, "ring").close()
        with pytest.raises(StreamTruncatedError, match="shared memory"):
            landing.wait()


@pytest.mark.parametrize("end", ["landing", "departure"])
def test_there_is_no_ring_with_a_peer_that_the_kernel_does_not_know(end: str):
    # Over TCP nobody says which user the peer is.
    with socket.create_server(("127.0.0.1", 0)) as listener, io_threads() as threads:
        ours = socket.create_connection(listener.getsockname())
        with listener.accept()[0], landing_into(make_prompt(100)) as landing:
            departure = Departure(threads, slots=2, slot_bytes=8000)
            departure.put(FRAMES[0])
            (landing if end == "landing" else departure).native.add(ours.detach(), "ring", 0, 1)
            with pytest.raises(PeerUnavailableError, match="for processes of user"):
                landing.wait() if end == "landing" else departure.wait(1)
            departure.close()


SENDING_PROCESS = """
import fcntl, os, socket, sys
peer = socket.socket(fileno=int(sys.argv[1]))
prefix, payload = bytes.fromhex(sys.argv[2]), bytes.fromhex(sys.stdin.read())
file = os.memfd_create("test", os.MFD_ALLOW_SEALING)
os.ftruncate(file, 4 * 8192)
os.pwrite(file, payload, 8192)
fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
socket.send_fds(peer, [b"FUXM" + bytes.fromhex("040000000020000000000000")], [file])
peer.sendall(prefix + prefix[:20])
os.abort()
"""


def test_a_sender_whose_process_ends_leaves_what_it_sent():
    prompt = make_prompt(100)
    with landing_into(prompt) as landing, landing.add(0, 1, "ring") as peer:
        command = [sys.executable, "-c", SENDING_PROCESS, str(peer.fileno())]
        subprocess.run(
            [*command, prefix_of(FRAMES[0], 1).hex()],
            pass_fds=[peer.fileno()],
            input=bytes(FRAMES[0].payload).hex().encode(),
            check=False,
            stderr=subprocess.DEVNULL,
        )
        peer.close()
        with pytest.raises(StreamTruncatedError, match="inside a frame"):
            landing.wait()
        assert landing.native.state()[1] == 1


def test_a_receiver_whose_process_ends_is_gone():
    with io_threads() as threads:
        departure = Departure(threads, slots=1, slot_bytes=8000)
        ours, theirs = socket.socketpair()
        departure.native.add(ours.detach(), "ring", 0, 1)
        for frame in FRAMES[:2]:
            departure.put(frame)
        with theirs:
            code = (
                f"import os, socket; socket.socket(fileno={theirs.fileno()}).recv(20); os.abort()"
            )
            subprocess.run(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                check=False,
                stderr=subprocess.DEVNULL,
            )
        with pytest.raises(PeerUnavailableError):
            departure.wait(2)
        departure.close()
