"""Beside shared memory, KV lands as over a stream; memory and slots are as agreed, or refused."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys

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
from tests.descriptors import open_descriptors, opened_since
from tests.fluxion_core.kernels.plane.rig import (
    Departure,
    io_threads,
    landing_into,
    make_frames,
    make_prompt,
)
from tests.fluxion_core.kernels.plane.ring_peer import (
    SLOTS,
    Sender,
    departure_to_python,
    prefix_of,
)

FRAMES = make_frames(100)


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
        assert not opened_since(before)
        departure.close()


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
        assert not opened_since(before)


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
