"""Frames survive the wire; whatever is not a frame is refused, and never with another error."""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxion_core.config.carriers import Carrier
from fluxion_core.errors import (
    FrameChecksumError,
    FrameFormatError,
    HandoffError,
    InvalidRequestError,
    SamplingError,
)
from fluxion_core.generation.sampling import SamplingParams
from fluxion_core.geometry import WindowSpec
from fluxion_core.kvstream.handoff import Endpoint, Frame, FrameKind, Header, KvLayout, Trailer
from fluxion_core.wire import codec
from fluxion_proto.v1 import handoff_pb2

LAYOUT = KvLayout("toy", "ab12", 2, 2, 16, 1e4, "cd34")
# By hand: a CHUNK of layer 3, tokens 32 to 48, with the payload "123456789", whose CRC32C is the
# check value of that polynomial, 0xE3069283.
VECTOR = (
    bytes.fromhex("4655584e 0100 0200 03000000 20000000 10000000 09000000 839206e3 00000000")
    + b"123456789"
)


def test_the_bytes_are_those_of_the_specification():
    frame = Frame(FrameKind.CHUNK, b"123456789", 3, 32, 16)
    assert codec.encode_frame(frame) == VECTOR
    assert codec.decode_frame(VECTOR) == frame


def test_the_specifications_example_is_that_frame():
    specification = (Path(__file__).parents[3] / "protos" / "README.md").read_text()
    (example,) = re.findall(r"```text\n(46 55 58 4E [0-9A-F\s]+)```", specification)
    assert bytes.fromhex(example) == VECTOR


@given(
    layer=st.integers(0, 2**32 - 1),
    first=st.integers(0, 2**32 - 1),
    count=st.integers(0, 2**32 - 1),
    payload=st.binary(max_size=300),
)
def test_chunks_survive_the_wire(layer: int, first: int, count: int, payload: bytes):
    frame = Frame(FrameKind.CHUNK, payload, layer, first, count)
    assert codec.decode_frame(codec.encode_frame(frame)) == frame


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes):
    with pytest.raises(HandoffError):
        codec.decode_frame(noise)


@given(at=st.integers(0, len(VECTOR) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_never_passes_for_the_same_frame(at: int, bit: int):
    damaged = bytearray(VECTOR)
    damaged[at] ^= 1 << bit
    try:
        frame = codec.decode_frame(bytes(damaged))
    except HandoffError:
        return
    # Layer and token numbers are not under the checksum; the assembler's order rules catch them.
    assert 8 <= at < 20
    assert frame != codec.decode_frame(VECTOR)


@pytest.mark.parametrize(
    ("offset", "value", "words"),
    [
        (0, "58", "begins with"),
        (4, "0200", "version 2"),
        (6, "0900", "kind 9"),
        (6, "0000", "kind 0"),
        (20, "08000000", "says 8 B"),
        (20, "ffffffff", "says"),
        (28, "01000000", "reserved"),
    ],
)
def test_files_that_must_fail(offset: int, value: str, words: str):
    damaged = bytearray(VECTOR)
    damaged[offset : offset + len(value) // 2] = bytes.fromhex(value)
    with pytest.raises(FrameFormatError, match=words):
        codec.decode_frame(bytes(damaged))


def test_a_wrong_checksum_names_the_frame():
    with pytest.raises(FrameChecksumError, match="layer 3 at token 32"):
        codec.decode_frame(VECTOR[:-1] + b"0")


@pytest.mark.parametrize("at", [32, 33, 32 + 5000, -4000, -9, -1])
def test_a_large_frame_that_is_damaged_anywhere_is_refused(at: int):
    payload = bytes(range(251)) * 41
    damaged = bytearray(codec.encode_frame(Frame(FrameKind.CHUNK, payload, 3, 32, 16)))
    damaged[at] ^= 16
    with pytest.raises(FrameChecksumError, match="layer 3 at token 32"):
        codec.decode_frame(bytes(damaged))


def test_frames_above_the_limit_are_refused_on_both_sides():
    too_large = bytes(codec.MAX_FRAME_PAYLOAD_BYTES + 1)
    with pytest.raises(FrameFormatError, match="limit"):
        codec.encode_frame(Frame(FrameKind.CHUNK, too_large))
    prefix = struct.pack(
        "<IHHIIIIII", codec.MAGIC, 1, FrameKind.CHUNK, 0, 0, 16, len(too_large), 0, 0
    )
    with pytest.raises(FrameFormatError, match="limit"):
        codec.decode_frame(prefix + too_large)


def test_a_trailer_may_be_as_large_as_a_chunk_and_a_header_may_not():
    # 80 layers of 64 heads and 8 KV heads need 0.8 MB; the limit is four times a HEADER's.
    profile = bytes(3 << 20)
    sent = codec.encode_frame(codec.trailer_frame(Trailer(7, 0.5, 1.5, 10, 1000, profile)))
    assert codec.parse_trailer(codec.decode_frame(sent)).prompt_profile == profile
    for kind, limit in ((FrameKind.TRAILER, 4 << 20), (FrameKind.HEADER, 1 << 20)):
        codec.encode_frame(Frame(kind, bytes(limit)))
        with pytest.raises(FrameFormatError, match=f"the limit is {limit}"):
            codec.encode_frame(Frame(kind, bytes(limit + 1)))


def test_control_frames_carry_no_layer():
    with pytest.raises(FrameFormatError, match="HEADER"):
        codec.decode_frame(codec.encode_frame(Frame(FrameKind.HEADER, b"", layer=1)))


def test_header_and_trailer_survive_the_wire():
    header = Header(LAYOUT, num_tokens=300, kv_from_token=128)
    trailer = Trailer(7, 0.5, 1.5, 10, 1000, b"profile")
    assert codec.parse_header(codec.header_frame(header)) == header
    assert codec.parse_trailer(codec.trailer_frame(trailer)) == trailer
    with pytest.raises(FrameFormatError, match="expected a HEADER"):
        codec.parse_header(codec.trailer_frame(trailer))
    with pytest.raises(FrameFormatError, match="no valid message"):
        codec.parse_trailer(Frame(FrameKind.TRAILER, b"\xff\xff\xff"))


ENDPOINTS = [
    Endpoint(Carrier.SOCKETS, bytes(16), bytes(range(32)), 4, port=50061, tls=True),
    Endpoint(Carrier.SHARED_MEMORY, bytes(16), bytes(range(32)), 1, unix_name="fluxion"),
]


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.way)
def test_where_kv_is_fetched_survives_the_wire(endpoint: Endpoint):
    header = Header(LAYOUT, 300, 128, endpoint)
    assert codec.parse_header(codec.header_frame(header)) == header
    assert header.way is endpoint.way
    assert str(endpoint.secret) not in repr(header)


def test_a_header_that_names_no_way_is_of_a_node_that_knows_grpc_alone():
    message = handoff_pb2.HandoffHeader(layout=codec.layout_to_proto(LAYOUT), num_tokens=7)
    frame = Frame(FrameKind.HEADER, message.SerializeToString())
    assert codec.parse_header(frame).way is Carrier.GRPC
    assert codec.ways_from_proto(handoff_pb2.HandoffRequest()) == (Carrier.GRPC,)


def test_ways_that_this_node_does_not_know_are_not_taken_for_grpc():
    assert codec.ways_from_proto(handoff_pb2.HandoffRequest(ways=[9])) == ()
    known = codec.ways_from_proto(handoff_pb2.HandoffRequest(ways=[9, 3, 1]))
    assert known == (Carrier.SHARED_MEMORY, Carrier.GRPC)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"way": 9}, "way 9"),
        ({"call_id": bytes(15)}, "call_id of 15 B"),
        ({"secret": bytes(33)}, "secret of 33 B"),
        ({"connections": 0}, "0 connections"),
        ({"connections": 17}, "17 connections"),
        ({"port": 0}, "port 0"),
        ({"port": 65536}, "port 65536"),
        ({"way": 3}, "unix_name of 0 B"),
        ({"way": 3, "unix_name": "x" * 108}, "unix_name of 108 B"),
    ],
)
def test_an_endpoint_that_cannot_be_is_refused(change: dict, words: str):
    message = handoff_pb2.HandoffHeader.FromString(
        bytes(codec.header_frame(Header(LAYOUT, 300, 0, ENDPOINTS[0])).payload)
    )
    for name, value in change.items():
        setattr(message, name, value)
    with pytest.raises(FrameFormatError, match=words):
        codec.parse_header(Frame(FrameKind.HEADER, message.SerializeToString()))


@pytest.mark.parametrize("field", ["queue_seconds", "prefill_seconds"])
@pytest.mark.parametrize("seconds", [math.nan, math.inf, -0.5])
def test_a_trailer_whose_seconds_are_none_is_refused(field: str, seconds: float):
    message = handoff_pb2.HandoffTrailer(**{field: seconds})
    with pytest.raises(FrameFormatError, match=field):
        codec.parse_trailer(Frame(FrameKind.TRAILER, message.SerializeToString()))


def test_the_window_of_a_profile_is_checked():
    def window(**fields: object) -> WindowSpec | None:
        return codec.profile_window_from_proto(handoff_pb2.HandoffRequest(**fields))

    assert window() is None
    wanted = {"want_prompt_profile": True}
    assert window(**wanted, sink_tokens=32, recent_tokens=128) == WindowSpec(32, 128)
    for fields, words in (
        (wanted, "sink_tokens is 0"),
        ({**wanted, "sink_tokens": 8, "recent_tokens": 256}, "sink_tokens is 8"),
        ({**wanted, "sink_tokens": 64, "recent_tokens": 64}, "recent_tokens is 64"),
        ({"sink_tokens": 64}, "set want_prompt_profile"),
    ):
        with pytest.raises(InvalidRequestError, match=words):
            window(**fields)


def test_sampling_survives_the_wire():
    params = SamplingParams(
        temperature=0.5,
        top_k=5,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.5,
        seed=2**64 - 1,
    )
    assert codec.sampling_from_proto(codec.sampling_to_proto(params)) == params
    assert codec.sampling_from_proto(codec.sampling_to_proto(SamplingParams())) == SamplingParams()
    message = codec.sampling_to_proto(SamplingParams())
    message.top_p = 1.5
    with pytest.raises(SamplingError, match="top_p"):
        codec.sampling_from_proto(message)
