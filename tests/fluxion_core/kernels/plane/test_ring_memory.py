"""Memory that a ring's sender hands over is as agreed and cannot change its size, or is refused."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile

import pytest

from fluxion_core.errors import (
    FrameFormatError,
    PeerUnavailableError,
    StreamTruncatedError,
)
from tests.descriptors import open_descriptors, opened_since
from tests.fluxion_core.kernels.plane.rig import (
    Departure,
    io_threads,
    landing_into,
    make_frames,
    make_prompt,
)
from tests.fluxion_core.kernels.plane.ring_peer import (
    SEALS,
    SLOT_BYTES,
    SLOTS,
    announcement,
    departure_to_python,
    shared_file,
)

FRAMES = make_frames(100)


def test_the_memory_handed_over_can_change_its_size_no_more():
    with departure_to_python() as (_, receiver):
        assert receiver.announcement == (b"FUXM", 2, 8192, 0)  # slots begin on pages
        assert os.fstat(receiver.file).st_size == 2 * 8192
        seals = fcntl.fcntl(receiver.file, fcntl.F_GET_SEALS)
        assert seals == SEALS | fcntl.F_SEAL_SEAL
        for size in (0, 2 * 8192 - 1, 1 << 20):
            with pytest.raises(PermissionError):
                os.ftruncate(receiver.file, size)


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
        assert not opened_since(before)


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
