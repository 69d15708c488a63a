"""Frames that leave are those that were put, in their layers' order, and land as they were."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pytest

from fluxion_core.errors import FluxionError, FrameFormatError, PeerUnavailableError, ShapeError
from tests.fluxion_core.kernels.plane.rig import (
    Departure,
    Landing,
    io_threads,
    make_frames,
    make_prompt,
    stream_of,
)

FRAMES = make_frames(300)


def received(peer: socket.socket, num_bytes: int) -> bytes:
    """So many bytes of a socket."""
    with peer.makefile("rb") as stream:
        return stream.read(num_bytes)


def add(departure: Departure, connection: int, of: int) -> socket.socket:
    """Begin a connection; returns the other end."""
    ours, theirs = socket.socketpair()
    departure.native.add(ours.detach(), "plain", connection, of)
    return theirs


@pytest.mark.parametrize("of", [1, 2, 4])
@pytest.mark.parametrize("transport", ["plain", "ring"])
def test_what_departs_lands(transport: str, of: int):
    found, expected = make_prompt(300), make_prompt(300)
    for frame in FRAMES:
        expected.sequence.write_blocks(
            frame.layer, frame.first_token, frame.num_tokens, frame.payload
        )
    with io_threads(2) as threads:
        departure, landing = Departure(threads, slots=2, slot_bytes=8192), Landing(threads, found)
        for frame in FRAMES[:5]:  # before there is a connection
            departure.put(frame)
        for connection in range(of):
            ours, theirs = socket.socketpair()
            departure.native.add(ours.detach(), transport, connection, of)
            landing.native.add(theirs.detach(), transport, connection, of)
        for frame in FRAMES[5:]:
            departure.put(frame)
        landing.wait()
        departure.wait(len(FRAMES))
        assert sorted(departure.finished) == list(range(len(FRAMES)))
        payload_bytes = sum(len(frame.payload) for frame in FRAMES)
        assert departure.look() == (payload_bytes, 0.0, None)
        assert departure.kept == {}
        departure.close()
        landing.close()
    assert found.slab_bytes == expected.slab_bytes


@pytest.mark.parametrize("of", [1, 2])
def test_bytes_on_the_wire_are_those_of_the_codec(of: int):
    with io_threads() as threads:
        departure = Departure(threads)
        peers = [add(departure, connection, of) for connection in range(of)]
        for frame in FRAMES:
            departure.put(frame)
        for connection, peer in enumerate(peers):
            expected = stream_of(FRAMES, connection, of)
            with peer:
                assert received(peer, len(expected)) == expected
        departure.close()


def test_a_payload_may_be_an_address():
    with io_threads() as threads:
        departure = Departure(threads)
        payload = np.frombuffer(FRAMES[0].payload, np.uint8)
        with add(departure, 0, 1) as peer:
            departure.native.put(0, 0, 48, payload.ctypes.data, len(payload))
            expected = stream_of(FRAMES[:1], 0, 1)
            assert received(peer, len(expected)) == expected
        departure.close()


def test_a_frame_that_nobody_takes_waits_and_holds_up_no_other():
    frames = make_frames(4096, frame_tokens=1024)
    with io_threads() as threads:
        unread, read = Departure(threads), Departure(threads)
        with add(unread, 0, 1) as first, add(read, 0, 1) as second:
            # More than the socket's buffer takes.
            for _ in range(8):
                unread.put(frames[0])
            read.put(frames[0])
            expected = stream_of(frames[:1], 0, 1)
            assert received(second, len(expected)) == expected
            read.wait(1)
            assert read.look()[1] == 0.0
            waited = [unread.look()[1] for _ in range(2)]
            assert 0.0 < waited[0] < waited[1]
            assert len(unread.finished) < 8
            assert received(first, 8 * len(expected)) == 8 * expected
            unread.wait(8)
            assert unread.look()[1] == 0.0
        unread.close()
        read.close()


def test_what_waits_in_a_senders_socket_is_bounded():
    listener = socket.create_server(("127.0.0.1", 0))
    with io_threads() as threads, listener:
        departure = Departure(threads)
        ours = socket.create_connection(listener.getsockname())
        same = socket.socket(fileno=os.dup(ours.fileno()))
        same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        before = same.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        departure.native.add(ours.detach(), "plain", 0, 1)
        with same:
            assert before < same.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 1 << 20
        departure.close()


def test_a_receiver_that_closes_when_all_is_there_is_no_error_until_more_is_to_go():
    with io_threads() as threads:
        departure = Departure(threads)
        departure.put(FRAMES[0])
        with add(departure, 0, 1) as peer:
            received(peer, len(stream_of(FRAMES[:1], 0, 1)))
            departure.wait(1)
        assert departure.look()[2] is None
        departure.put(FRAMES[3])
        with pytest.raises(PeerUnavailableError, match=r"closed connection 0|while writing"):
            departure.wait(2)
        departure.close()


def test_a_receiver_that_goes_while_frames_wait_is_gone():
    frames = make_frames(1024, frame_tokens=1024)
    with io_threads() as threads:
        departure = Departure(threads)
        for _ in range(8):
            departure.put(frames[0])
        with add(departure, 0, 1) as peer:
            received(peer, 1000)
        with pytest.raises(PeerUnavailableError):
            departure.wait(8)
        departure.close()


def test_a_receiver_that_writes_is_refused():
    with io_threads() as threads:
        departure = Departure(threads)
        with add(departure, 0, 1) as peer:
            peer.send(b"x")
            with pytest.raises(FrameFormatError, match="only reads"):
                departure.wait(1)
        departure.close()


def test_a_frame_larger_than_a_slot_is_an_error():
    with io_threads() as threads:
        departure = Departure(threads, slots=2, slot_bytes=4096)
        ours, theirs = socket.socketpair()
        with theirs:
            departure.native.add(ours.detach(), "ring", 0, 1)
            departure.put(FRAMES[0])
            with pytest.raises(FluxionError, match="slot"):
                departure.wait(1)
        departure.close()


def test_after_close_nothing_leaves():
    frames = make_frames(1024, frame_tokens=1024)
    with io_threads() as threads:
        departure = Departure(threads)
        with add(departure, 0, 1) as peer:
            for _ in range(8):
                departure.put(frames[0])
            received(peer, 10)
            departure.native.close()
            departure.native.close()
            # What the kernel has already taken comes; then the end.
            assert len(received(peer, -1)) < 8 * len(frames[0].payload)
        with pytest.raises(RuntimeError, match="closed"):
            departure.put(frames[0])
        departure.close()


@pytest.mark.parametrize(
    "numbers",
    [
        (-1, 0, 16, 4),
        (1 << 32, 0, 16, 4),
        (0, -1, 16, 4),
        (0, 0, 0, 4),
        (0, 0, 1 << 32, 4),
        (0, 0, 16, 0),
        (0, 0, 16, (4 << 20) + 1),
    ],
)
def test_a_frame_that_cannot_be_is_refused(numbers: tuple[int, int, int, int]):
    payload = np.zeros((4 << 20) + 1, np.uint8)
    *place, num_bytes = numbers
    with io_threads() as threads:
        departure = Departure(threads)
        with pytest.raises(ValueError, match=r"payload|32 bits"):
            departure.native.put(*place, payload, num_bytes)
        departure.close()


def test_a_payload_that_is_too_short_or_no_bytes_is_a_shape_error():
    with io_threads() as threads:
        departure = Departure(threads)
        with pytest.raises(ShapeError, match="payload has 4 bytes; 5 are to leave"):
            departure.native.put(0, 0, 16, np.zeros(4, np.uint8), 5)
        with pytest.raises(ShapeError, match="payload is float32"):
            departure.native.put(0, 0, 16, np.zeros(4, np.float32), 4)
        departure.close()


def test_threads_have_names():
    with io_threads(2):
        names = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
    assert {"fluxion-kv-0", "fluxion-kv-1"} <= names
