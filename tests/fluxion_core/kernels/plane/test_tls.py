"""Under TLS, KV lands as in the clear; without the key, or with a byte changed, it does not."""

from __future__ import annotations

import itertools
import os
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from fluxion_core.errors import PeerUnavailableError, StreamTruncatedError
from fluxion_core.kernels import _native
from fluxion_core.kvstream.handoff import Frame
from tests.certificates import Authority
from tests.fluxion_core.kernels.plane.rig import (
    PATIENCE_SECONDS,
    Departure,
    Landing,
    Prompt,
    io_threads,
    make_frames,
    make_prompt,
    stream_of,
)

KEY = bytes(range(32))
IDENTITY = b"\x00\x01call\x00\xff\xfe-identity"
OTHER_KEY = KEY[:-1] + b"\xff"
OTHER_IDENTITY = IDENTITY[:-1] + b"x"
SMALL = make_frames(100)
LARGE = make_frames(4096, frame_tokens=1024)
"""128 KiB each: many records, and more than a batch of them."""

Change = Callable[[bytes], bytes]


def written(frames: list[Frame], num_tokens: int) -> list[bytes]:
    """What slabs hold once these frames are in."""
    prompt = make_prompt(num_tokens)
    for frame in frames:
        prompt.sequence.write_blocks(
            frame.layer, frame.first_token, frame.num_tokens, frame.payload
        )
    return prompt.slab_bytes


class Pair:
    """A departure and a landing, one thread each."""

    def __init__(
        self, sending: _native.IoThreads, receiving: _native.IoThreads, prompt: Prompt
    ) -> None:
        self.departure = Departure(sending)
        self.landing = Landing(receiving, prompt)

    def send(
        self,
        end: socket.socket,
        connection: int = 0,
        of: int = 1,
        *,
        key: bytes = KEY,
        identity: bytes = IDENTITY,
    ) -> None:
        """The departure's end."""
        self.departure.native.add(end.detach(), "tls", connection, of, key, identity)

    def receive(
        self,
        end: socket.socket,
        connection: int = 0,
        of: int = 1,
        *,
        key: bytes = KEY,
        identity: bytes = IDENTITY,
    ) -> None:
        """The landing's end."""
        self.landing.native.add(end.detach(), "tls", connection, of, key, identity)


@contextmanager
def pair_into(prompt: Prompt) -> Iterator[Pair]:
    """A pair for the time of a test."""
    with io_threads() as sending, io_threads() as receiving:
        pair = Pair(sending, receiving, prompt)
        try:
            yield pair
        finally:
            pair.departure.close()
            pair.landing.close()


def forward(source: socket.socket, sink: socket.socket, change: Change) -> None:
    """Bytes of a socket to another; where either ends, or bytes are left out, both end."""
    with suppress(OSError):
        while data := source.recv(1 << 16):
            changed = change(data)
            sink.sendall(changed)
            if len(changed) < len(data):
                break
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextmanager
def man_in_the_middle(pair: Pair, change: Change) -> Iterator[None]:
    """A connection whose bytes from the departure to the landing go through `change`."""
    sender, near = socket.socketpair()
    far, receiver = socket.socketpair()
    threads = [
        threading.Thread(target=forward, args=arguments)
        for arguments in ((near, far, change), (far, near, bytes))
    ]
    pair.send(sender)
    pair.receive(receiver)
    with near, far:
        for thread in threads:
            thread.start()
        yield
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive()


def test_there_is_tls_here():
    assert _native.tls_missing() == ""


@pytest.mark.parametrize("of", [1, 2, 4])
def test_what_departs_lands(of: int):
    prompt = make_prompt(4096)
    with pair_into(prompt) as pair:
        for frame in LARGE[:5]:
            pair.departure.put(frame)
        for connection in range(of):
            sender, receiver = socket.socketpair()
            # So that neither end can write all that it wants to.
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
            pair.send(sender, connection, of)
            pair.receive(receiver, connection, of)
        for frame in LARGE[5:]:
            pair.departure.put(frame)
        pair.landing.wait()
        pair.departure.wait(len(LARGE))
        assert pair.departure.look() == (sum(len(frame.payload) for frame in LARGE), 0.0, None)
    assert prompt.slab_bytes == written(LARGE, 4096)


def test_what_departs_lands_over_tcp():
    prompt = make_prompt(4096)
    with socket.create_server(("127.0.0.1", 0)) as listener, pair_into(prompt) as pair:
        pair.receive(socket.create_connection(listener.getsockname()))
        pair.send(listener.accept()[0])
        for frame in LARGE:
            pair.departure.put(frame)
        pair.landing.wait()
        pair.departure.wait(len(LARGE))
    assert prompt.slab_bytes == written(LARGE, 4096)


def test_bytes_may_come_a_few_at_a_time():
    prompt = make_prompt(100)
    with pair_into(prompt) as pair:
        sender, near = socket.socketpair()
        far, receiver = socket.socketpair()
        pair.send(sender)
        pair.receive(receiver)
        for frame in SMALL:
            pair.departure.put(frame)
        with near, far:
            while not pair.landing.is_whole:
                ready, _, _ = select.select([near, far, pair.landing.event.fd], [], [], 20)
                if pair.landing.event.fd in ready:
                    os.eventfd_read(pair.landing.event.fd)
                    assert pair.landing.error is None
                if near in ready:
                    far.sendall(near.recv(97))
                if far in ready:
                    near.sendall(far.recv(7))
    assert prompt.slab_bytes == written(SMALL, 100)


def test_nothing_of_the_kv_is_to_be_seen_on_the_way():
    passed: list[bytes] = []

    def listen(data: bytes) -> bytes:
        passed.append(data)
        return data

    with pair_into(make_prompt(100)) as pair:
        with man_in_the_middle(pair, listen):
            for frame in SMALL:
                pair.departure.put(frame)
            pair.landing.wait()
    stream = b"".join(passed)
    clear = stream_of(SMALL, 0, 1)
    assert len(stream) > len(clear)
    assert b"FUXN" in clear
    assert b"FUXN" not in stream
    assert not any(clear[i : i + 16] in stream for i in range(0, len(clear) - 16, 1024))


@pytest.mark.parametrize(
    ("key", "identity", "sender_says"),
    [
        (OTHER_KEY, IDENTITY, "TLS handshake"),
        (KEY, OTHER_IDENTITY, "names another key"),
        (KEY, IDENTITY[:-1], "names another key"),
        (OTHER_KEY, OTHER_IDENTITY, "names another key"),
    ],
    ids=["key", "identity", "part of the identity", "both"],
)
def test_who_does_not_hold_the_key_is_refused(key: bytes, identity: bytes, sender_says: str):
    prompt = make_prompt(100)
    with pair_into(prompt) as pair:
        sender, receiver = socket.socketpair()
        pair.departure.put(SMALL[0])
        pair.send(sender)
        pair.receive(receiver, key=key, identity=identity)
        with pytest.raises(PeerUnavailableError, match=sender_says):
            pair.departure.wait(1)
        with pytest.raises(PeerUnavailableError, match="TLS handshake"):
            pair.landing.wait()
        assert pair.departure.finished == []
        assert pair.landing.native.state()[3] == 0


@pytest.mark.parametrize(
    "said",
    [
        stream_of(SMALL[:1], 0, 1),
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(100),
        b"\x16\x03\x01\xff\xff" + bytes(70000),  # a record longer than there are
        b"\x16\x03\x03\x00\x04\x01\x00\xff\xff" + bytes(1000),  # a hello of which most is missing
        b"\x15\x03\x03\x00\x02\x02\x28",  # an alert
        b"\x17\x03\x03\x00\x20" + bytes(32),  # data before there are keys
    ],
    ids=["frame", "http", "zeros", "long", "hello", "alert", "data"],
)
@pytest.mark.parametrize("end", ["landing", "departure"])
def test_what_is_no_tls_is_refused(end: str, said: bytes):
    with pair_into(make_prompt(100)) as pair:
        ours, theirs = socket.socketpair()
        pair.departure.put(SMALL[0])
        (pair.receive if end == "landing" else pair.send)(ours)
        with theirs:
            theirs.sendall(said)
            theirs.shutdown(socket.SHUT_WR)
            with pytest.raises(PeerUnavailableError, match="TLS handshake"):
                pair.landing.wait() if end == "landing" else pair.departure.wait(1)
            answered = bytearray()
            while data := theirs.recv(1 << 16):
                answered += data
        assert b"FUXN" not in answered
        assert pair.landing.native.state()[3] == 0


def test_a_server_with_a_certificate_in_place_of_the_key_is_refused(tmp_path: Path):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*Authority(tmp_path).issue("prefill"))
    with pair_into(make_prompt(100)) as pair:
        ours, theirs = socket.socketpair()
        pair.receive(ours)
        with pytest.raises(ssl.SSLError), context.wrap_socket(theirs, server_side=True) as server:
            server.recv(1)
        with pytest.raises(PeerUnavailableError, match="TLS handshake: certificate"):
            pair.landing.wait()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_without_a_key_is_refused(version: ssl.TLSVersion):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    with pair_into(make_prompt(100)) as pair:
        ours, theirs = socket.socketpair()
        pair.departure.put(SMALL[0])
        pair.send(ours)
        with pytest.raises(ssl.SSLError), context.wrap_socket(theirs):
            pass
        with pytest.raises(PeerUnavailableError, match="TLS handshake"):
            pair.departure.wait(1)


@pytest.mark.parametrize("at", [0, 30, 200, 1000, 20_000, 200_000])
def test_a_bit_changed_on_the_way_ends_it(at: int):
    position = itertools.count()

    def flip(data: bytes) -> bytes:
        changed = bytearray(data)
        for i in range(len(data)):
            if next(position) == at:
                changed[i] ^= 0x10
        return bytes(changed)

    with pair_into(make_prompt(4096)) as pair:
        with man_in_the_middle(pair, flip):
            for frame in LARGE[:3]:
                pair.departure.put(frame)
            with pytest.raises(PeerUnavailableError, match="TLS"):
                pair.landing.wait()
            taken = pair.landing.native.state()
            assert taken[1] == (at == 200_000)  # the first frame was whole


@pytest.mark.parametrize(
    ("length", "kind"),
    [
        (0, PeerUnavailableError),
        (60, PeerUnavailableError),
        (1000, StreamTruncatedError),
        (5000, StreamTruncatedError),
        (20_000, StreamTruncatedError),
    ],
)
def test_a_stream_cut_on_the_way_is_an_end_before_its_time(length: int, kind: type[Exception]):
    left = [length]

    def cut(data: bytes) -> bytes:
        passed = data[: left[0]]
        left[0] -= len(passed)
        return passed

    with pair_into(make_prompt(100)) as pair:
        with man_in_the_middle(pair, cut):
            for frame in SMALL:
                pair.departure.put(frame)
            with pytest.raises(kind):
                pair.landing.wait()


@pytest.mark.parametrize("end", ["landing", "departure"])
def test_a_peer_that_is_gone_before_the_handshake_is_no_peer(end: str):
    with pair_into(make_prompt(100)) as pair:
        ours, theirs = socket.socketpair()
        theirs.close()
        pair.departure.put(SMALL[0])
        (pair.receive if end == "landing" else pair.send)(ours)
        with pytest.raises(PeerUnavailableError, match="TLS handshake"):
            pair.landing.wait() if end == "landing" else pair.departure.wait(1)


@pytest.mark.parametrize(
    ("key", "identity"), [(b"", IDENTITY), (KEY[:31], IDENTITY), (KEY, b""), (KEY, bytes(129))]
)
def test_keys_and_identities_have_their_lengths(key: bytes, identity: bytes):
    with pair_into(make_prompt(100)) as pair:
        for add in (pair.send, pair.receive):
            ours, theirs = socket.socketpair()
            with theirs:
                with pytest.raises(ValueError, match="a key of 32 B"):
                    add(ours, key=key, identity=identity)
                assert theirs.recv(1) == b""
