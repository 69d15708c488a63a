"""KV from connections lies as the gRPC stream's does, and what is damaged is refused alike."""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import replace

import numpy as np
import pytest

from fluxion_core.errors import (
    FluxionError,
    FrameChecksumError,
    FrameFormatError,
    FrameOrderError,
    NonFiniteKvError,
    PeerUnavailableError,
    StreamTruncatedError,
)
from fluxion_core.geometry import KvGeometry
from fluxion_core.kernels import _native
from fluxion_core.kernels.isa import native_layout
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstream.assembler import HandoffAssembler
from fluxion_core.kvstream.handoff import Frame, Header
from fluxion_core.wire import codec
from tests.fluxion_core.kernels.plane.rig import (
    GEOMETRY,
    PREFIX,
    Landing,
    io_threads,
    kv_layout,
    landing_into,
    make_frames,
    make_prompt,
    stream_of,
)

BYTES_OF_DIGESTS = KvGeometry(3, 2, 32, slab_tokens=256, digest_bits=8)


def assembler_of(sequence: SequenceKv, kv_from_token: int = 0) -> HandoffAssembler:
    layout = kv_layout(sequence.store.geometry)
    tokens = sequence.num_prompt_tokens
    assembler = HandoffAssembler(sequence, layout, num_tokens=tokens, kv_from_token=kv_from_token)
    assembler.take_header(Header(layout, tokens, kv_from_token))
    return assembler


@pytest.mark.parametrize("of", [1, 2, 3, 5])
@pytest.mark.parametrize("num_tokens", [1, 16, 128, 300])
@pytest.mark.parametrize("geometry", [GEOMETRY, BYTES_OF_DIGESTS], ids=["bf16", "bytes"])
def test_what_lands_is_what_the_stream_writes(
    each_isa: str, geometry: KvGeometry, num_tokens: int, of: int
):
    frames = make_frames(num_tokens, geometry)
    expected, found = make_prompt(num_tokens, geometry), make_prompt(num_tokens, geometry)
    for frame in frames:
        expected.sequence.write_blocks(
            frame.layer, frame.first_token, frame.num_tokens, frame.payload
        )
    with landing_into(found, threads=2) as landing:
        for connection in range(of):
            # A connection without a layer is closed at once.
            with landing.add(connection, of) as peer:
                if connection < geometry.num_layers:
                    peer.sendall(stream_of(frames, connection, of))
                assert peer.recv(1) == b""
        landing.wait()
        payload_bytes = sum(len(frame.payload) for frame in frames)
        received = payload_bytes + PREFIX.size * len(frames)
        assert landing.native.state() == (
            payload_bytes,
            len(frames),
            num_tokens,
            received,
            True,
            None,
        )
    assert found.slab_bytes == expected.slab_bytes


def test_a_prompt_goes_on_behind_what_is_stored():
    frames = make_frames(300, kv_from_token=160)
    expected, found = make_prompt(300), make_prompt(300)
    for prompt in (expected, found):
        prompt.sequence.shared_tokens = 160
        prompt.sequence.restart()
    for frame in frames:
        expected.sequence.write_blocks(
            frame.layer, frame.first_token, frame.num_tokens, frame.payload
        )
    with landing_into(found, kv_from_token=160) as landing:
        assert landing.native.state()[2] == 160
        landing.feed(0, 1, stream_of(frames, 0, 1))
        landing.wait()
    assert found.slab_bytes == expected.slab_bytes


def test_a_layer_of_a_chunk_counts_for_its_share_of_the_tokens():
    # By hand: of three layers, one with 48 tokens is 16 tokens; bytes count as they come.
    frames = make_frames(96)
    first = codec.encode_frame(frames[0])
    with landing_into(make_prompt(96)) as landing, landing.add(0, 1) as peer:
        peer.sendall(first + first[:10])
        taken = (len(frames[0].payload), 1, 16, len(first) + 10, False, None)
        landing.event.watch_until(lambda: landing.native.state() == taken)


def test_tokens_are_whole_when_the_last_layer_has_them():
    # By hand: three layers, each in two frames of 48 tokens. Both of the first, then one of each.
    frames = make_frames(96)
    assert [(frame.layer, frame.first_token) for frame in frames[:4]] == [
        *((0, 0), (1, 0), (2, 0), (0, 48)),
    ]
    whole = []
    with landing_into(make_prompt(96)) as landing, landing.add(0, 1) as peer:
        for frame in frames:
            peer.sendall(codec.encode_frame(frame))
            taken = 1 + len(whole)
            landing.event.watch_until(lambda taken=taken: landing.native.state()[1] == taken)
            whole.append(landing.native.whole_tokens)
        landing.wait()
    assert whole == [0, 0, 48, 48, 48, 96]
    assert landing.native.whole_tokens == 96


def test_bytes_may_come_one_at_a_time():
    frames = make_frames(16, frame_tokens=16)
    found, expected = make_prompt(16), make_prompt(16)
    with landing_into(found) as landing, landing.add(0, 1) as peer:
        for byte in stream_of(frames, 0, 1):
            peer.sendall(bytes([byte]))
        landing.wait()
    with landing_into(expected) as landing:
        landing.feed(0, 1, stream_of(frames, 0, 1))
        landing.wait()
    assert found.slab_bytes == expected.slab_bytes


def patched(frame: Frame, **fields: int) -> bytes:
    """A frame with other numbers in its prefix."""
    names = ("magic", "version", "kind", "layer", "first_token", "num_tokens")
    names += ("payload_bytes", "crc32c", "reserved")
    message = codec.encode_frame(frame)
    values = dict(zip(names, PREFIX.unpack_from(message), strict=True)) | fields
    return PREFIX.pack(*values.values()) + message[PREFIX.size :]


def with_bits(frame: Frame, at: int, bits: int) -> bytes:
    """A frame with another value in its payload, and the checksum of it."""
    payload = bytearray(frame.payload)
    struct.pack_into("<H", payload, at, bits)
    return codec.encode_frame(replace(frame, payload=bytes(payload)))


FRAMES = make_frames(100)
"""Three layers of 48, 48 and 4 tokens."""
LAST = replace(FRAMES[-1], payload=FRAMES[-1].payload[:-1])

# Of a layer's payload: 2 heads, 3 blocks, K and V of 16 tokens, 16 channels, 2 bytes.
HEAD, BLOCK, SIDE, TOKEN = 3072, 1024, 512, 32

DAMAGE = {
    "magic": (0, patched(FRAMES[0], magic=7), FrameFormatError),
    "version": (0, patched(FRAMES[0], version=2), FrameFormatError),
    "reserved": (0, patched(FRAMES[0], reserved=1), FrameFormatError),
    "too large": (0, patched(FRAMES[0], payload_bytes=(4 << 20) + 1), FrameFormatError),
    "layer": (0, patched(FRAMES[0], layer=3), FrameFormatError),
    "layer of many": (0, patched(FRAMES[0], layer=0xFFFFFFFF), FrameFormatError),
    "repeat": (3, codec.encode_frame(FRAMES[0]), FrameOrderError),
    "gap": (0, codec.encode_frame(FRAMES[3]), FrameOrderError),
    "inside a block": (0, patched(FRAMES[0], first_token=1), FrameOrderError),
    "no tokens": (0, patched(FRAMES[0], num_tokens=0), FrameFormatError),
    "ragged": (0, patched(FRAMES[0], num_tokens=47), FrameFormatError),
    "beyond the prompt": (6, patched(FRAMES[6], num_tokens=16), FrameFormatError),
    "around 2^32": (3, patched(FRAMES[3], num_tokens=0xFFFFFFD0), FrameFormatError),
    "too few bytes": (8, codec.encode_frame(LAST), FrameFormatError),
    "of another size": (0, patched(FRAMES[0], num_tokens=32), FrameFormatError),
    "crc": (1, patched(FRAMES[1], crc32c=5), FrameChecksumError),
    "bit": (1, codec.encode_frame(FRAMES[1])[:-1] + b"\x55", FrameChecksumError),
    "nan in k": (3, with_bits(FRAMES[3], BLOCK + 3 * TOKEN, 0x7FC0), NonFiniteKvError),
    "inf in v": (3, with_bits(FRAMES[3], HEAD + SIDE + 5 * TOKEN + 4, 0xFF80), NonFiniteKvError),
}


def oracle_error(frames: list[Frame], message: bytes) -> FluxionError:
    """What the stream's receiver says of a message after these frames."""
    assembler = assembler_of(make_prompt(100).sequence)
    for frame in frames:
        assembler.take_chunk(frame)
    with pytest.raises(FluxionError) as refused:
        codec.take_message(assembler, message)
    return refused.value


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_as_by_the_stream(name: str):
    after, message, kind = DAMAGE[name]
    prompt = make_prompt(100)
    with landing_into(prompt) as landing:
        landing.feed(0, 1, stream_of(FRAMES[:after], 0, 1) + message)
        with pytest.raises(kind) as refused:
            landing.wait()
        assert type(refused.value) is kind
        assert landing.native.state()[1] == after
        assert not landing.is_whole
    if name not in ("too large", "of another size"):  # a message's length says it, a stream's not
        expected = oracle_error(FRAMES[:after], message)
        assert (type(expected), str(expected)) == (kind, str(refused.value))
        assert vars(expected) == vars(refused.value)


@pytest.mark.parametrize("kind", [0, 1, 3, 4])
def test_beside_the_call_there_are_chunks_alone(kind: int):
    with landing_into(make_prompt(100)) as landing:
        landing.feed(0, 1, patched(FRAMES[0], kind=kind))
        with pytest.raises(FrameFormatError, match=f"kind {kind}"):
            landing.wait()


def test_a_layer_of_another_connection_is_refused():
    with landing_into(make_prompt(100)) as landing:
        landing.feed(1, 2, codec.encode_frame(FRAMES[0]))
        with pytest.raises(FrameFormatError, match="layer 0 on connection 1 of 2"):
            landing.wait()


def test_what_lies_behind_the_last_token_is_not_looked_at_and_becomes_zeros():
    # By hand: 4 tokens of a block; the fifth is NaN.
    last = FRAMES[6]
    poisoned = with_bits(last, 4 * TOKEN, 0x7FC0)
    stream = stream_of(FRAMES[:6], 0, 1) + poisoned + stream_of(FRAMES[7:], 0, 1)
    prompt = make_prompt(100)
    with landing_into(prompt) as landing:
        landing.feed(0, 1, stream)
        landing.wait()
    kv = prompt.store.slab_kv(prompt.sequence.slabs[0])[0, 0, 6]
    assert not kv[:, 4:].any()


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 3000, 6175, 6176, 6180])
def test_a_connection_that_ends_early_is_truncated(length: int):
    with landing_into(make_prompt(100)) as landing:
        landing.feed(0, 1, stream_of(FRAMES, 0, 1)[:length])
        with pytest.raises(StreamTruncatedError, match="connection 0 of 1 ended") as ended:
            landing.wait()
        assert ("inside a frame" in str(ended.value)) == (length % 6176 != 0)


def test_one_of_many_that_ends_early_ends_all():
    prompt = make_prompt(100)
    with landing_into(prompt, threads=2) as landing:
        with landing.add(0, 3) as whole, landing.add(1, 3) as cut, landing.add(2, 3) as rest:
            whole.sendall(stream_of(FRAMES, 0, 3))
            assert whole.recv(1) == b""
            cut.sendall(stream_of(FRAMES, 1, 3)[:-1])
            cut.shutdown(socket.SHUT_WR)
            with pytest.raises(StreamTruncatedError, match="with 0 of its 1 layers whole"):
                landing.wait()
            taken = landing.native.state()
            rest.sendall(stream_of(FRAMES, 2, 3))
            # Its next turn closes it, with what came unread.
            with pytest.raises(ConnectionResetError):
                rest.recv(1)
            assert landing.native.state()[:3] == taken[:3]


def test_a_reset_is_a_peer_that_is_gone():
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, landing_into(make_prompt(100)) as landing:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
        landing.native.add(ours.detach(), "plain", 0, 1)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.close()
        with pytest.raises(PeerUnavailableError, match="reset"):
            landing.wait()


@pytest.mark.parametrize("more", [1, 31, 32, 5000])
def test_what_comes_after_the_last_frame_is_refused(more: int):
    again = codec.encode_frame(FRAMES[-1])[:more]
    with landing_into(make_prompt(100)) as landing:
        landing.feed(0, 1, stream_of(FRAMES, 0, 1) + again)
        with pytest.raises(FrameFormatError if more < 32 else FrameOrderError):
            landing.wait()
        assert not landing.is_whole


def test_a_connection_that_does_not_finish_its_frame_holds_up_no_other():
    frames = make_frames(300)
    slow, quick = make_prompt(300), make_prompt(300)
    with io_threads() as threads:
        first, second = Landing(threads, slow), Landing(threads, quick)
        with first.add(0, 1) as peer:
            peer.sendall(stream_of(frames, 0, 1)[:-1])
            second.feed(0, 1, stream_of(frames, 0, 1))
            second.wait()
            assert not first.is_whole
            peer.sendall(stream_of(frames, 0, 1)[-1:])
            first.wait()
        first.close()
        second.close()
    assert slow.slab_bytes == quick.slab_bytes


def test_after_close_nothing_is_written():
    prompt = make_prompt(100)
    stream = stream_of(FRAMES, 0, 1)
    with landing_into(prompt) as landing, landing.add(0, 1) as peer:
        peer.sendall(stream[:4000])
        landing.event.watch_until(lambda: landing.native.state()[3] == 4000)
        landing.native.close()
        landing.native.close()
        before = prompt.slab_bytes
        assert peer.recv(1) == b""
        with pytest.raises(BrokenPipeError):
            peer.sendall(stream[4000:])
        assert prompt.slab_bytes == before
        with pytest.raises(RuntimeError, match="closed"):
            landing.add(0, 1)


def test_threads_that_end_close_what_is_left():
    with io_threads(2) as threads:
        landing = Landing(threads, make_prompt(100))
        with landing.add(0, 2) as first, landing.add(1, 2) as second:
            threads.close()
            assert first.recv(1) == second.recv(1) == b""
            with pytest.raises(RuntimeError, match="closed"):
                Landing(threads, make_prompt(100)).add(0, 1)
        landing.close()


def test_threads_count_their_processor_time_and_keep_it():
    frames = make_frames(4096, frame_tokens=1024)
    with io_threads() as threads:
        landing = Landing(threads, make_prompt(4096))
        with landing.add(0, 1) as peer:
            peer.sendall(stream_of(frames, 0, 1))
            landing.wait()
        landing.close()
        spent = threads.cpu_seconds()
        assert 0 < spent < 10
        threads.close()
        assert threads.cpu_seconds() >= spent


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("transport", "connection", "of", "says"),
    [
        ("pigeon", 0, 1, "pigeon"),
        ("plain", 1, 1, "connection"),
        ("plain", -1, 1, "connection"),
        ("plain", 0, 0, "1 to 64"),
        ("plain", 0, 65, "1 to 64"),
    ],
)
def test_a_descriptor_that_is_refused_is_closed(
    transport: str, connection: int, of: int, says: str
):
    ours, theirs = socket.socketpair()
    with theirs, landing_into(make_prompt(100)) as landing:
        fd = ours.detach()
        with pytest.raises(ValueError, match=says):
            landing.native.add(fd, transport, connection, of)
        assert not is_open(fd)


def test_a_connection_comes_once_and_all_are_of_the_same_number():
    with landing_into(make_prompt(100)) as landing, landing.add(0, 2):
        with pytest.raises(ValueError, match="there already"):
            landing.add(0, 2)
        with pytest.raises(ValueError, match="same number"):
            landing.add(1, 3)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"kv_from_token": 8}, "kv_from_token"),
        ({"kv_from_token": 112}, "kv_from_token"),
        ({"kv_from_token": -16}, "kv_from_token"),
        ({"num_tokens": 1 << 33}, "kv_from_token"),
        ({"num_tokens": 129}, "slabs"),
        ({"slabs": np.zeros(1, np.int64)}, "slabs"),
    ],
)
def test_a_landing_without_a_place_is_refused(changed: dict[str, object], says: str):
    given = {"slabs": np.ones(1, np.int64), "num_tokens": 100, "kv_from_token": 0, "event_fd": 0}
    with io_threads() as threads, pytest.raises(ValueError, match=says):
        _native.KvLanding(threads, native_layout(GEOMETRY), **(given | changed))


@pytest.mark.parametrize("arguments", [(0,), (1, [-1]), (1, [1 << 20]), (1, [], -1), (1, [], 20)])
def test_threads_that_cannot_be_are_refused(arguments: tuple[object, ...]):
    with pytest.raises(ValueError, match=r"threads|cpus|niceness"):
        _native.IoThreads(*arguments)
