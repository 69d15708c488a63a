"""Bytes to frames and messages to dataclasses, and back. Specified in protos/README.md."""

from __future__ import annotations

import math
import struct

import numpy as np
from google.protobuf.message import DecodeError

from fluxion_core.config.carriers import Carrier
from fluxion_core.errors import (
    FrameChecksumError,
    FrameFormatError,
    InvalidRequestError,
    ShapeError,
)
from fluxion_core.generation.sampling import SamplingParams
from fluxion_core.geometry import WindowSpec
from fluxion_core.kernels.crc32c.cpu import crc32c
from fluxion_core.kvstream.assembler import HandoffAssembler
from fluxion_core.kvstream.handoff import (
    Endpoint,
    Frame,
    FrameKind,
    Header,
    KvLayout,
    Trailer,
)
from fluxion_core.wire.frame_limits import MAX_FRAME_PAYLOAD_BYTES, PREFIX_BYTES
from fluxion_proto.v1 import generate_pb2, handoff_pb2

MAGIC = 0x4E585546
"""The bytes F U X N."""

VERSION = 1

# magic u32 | version u16 | kind u16 | layer u32 | first_token u32 | num_tokens u32 |
# payload_bytes u32 | crc32c u32 | reserved u32, all little-endian
_PREFIX = struct.Struct("<IHHIIIIII")

assert _PREFIX.size == PREFIX_BYTES

CALL_ID_BYTES = 16
SECRET_BYTES = 32
MAX_CONNECTIONS = 16
"""Of one hand-off, beside its call."""

MAX_PORT = 65535
MAX_UNIX_NAME_BYTES = 107
"""Of an abstract name, without the zero byte before it."""

MAX_HEADER_PAYLOAD_BYTES = 1 << 20
"""A HEADER is a message of a few hundred bytes; this leaves room for more. A TRAILER may hold a
prompt profile (154 B per layer and head): 0.8 MB for 80 layers of 64 heads, so it may be as large
as any frame."""


WAY_NUMBERS = {
    Carrier.GRPC: handoff_pb2.GRPC,
    Carrier.SOCKETS: handoff_pb2.SOCKETS,
    Carrier.SHARED_MEMORY: handoff_pb2.SHARED_MEMORY,
}
"""As messages and a connection's first bytes have them."""


def encode_frame(frame: Frame) -> bytes:
    """Prefix and payload as one message. Copies the payload once.

    Raises:
        FrameFormatError: the payload is above its limit.
    """
    payload = frame.payload
    _check_payload_bytes(frame.kind, len(payload))
    prefix = _PREFIX.pack(
        MAGIC,
        VERSION,
        frame.kind,
        frame.layer,
        frame.first_token,
        frame.num_tokens,
        len(payload),
        _checksum(payload),
        0,
    )
    return b"".join((prefix, payload))


def decode_frame(message: bytes) -> Frame:
    """Check one message and return its frame; the payload is a view into the message.

    Raises:
        FrameFormatError: too short, wrong magic, version, kind, reserved bits or length.
        FrameChecksumError: CRC32C of the payload differs from the prefix.
    """
    if len(message) < PREFIX_BYTES:
        raise FrameFormatError(
            f"frame of {len(message)} B is shorter than its {PREFIX_BYTES} B prefix"
        )
    magic, version, kind, layer, first_token, num_tokens, payload_bytes, expected, reserved = (
        _PREFIX.unpack_from(message)
    )
    if magic != MAGIC:
        raise FrameFormatError(f"frame begins with {magic:#010x}; need {MAGIC:#010x}")
    if version != VERSION:
        raise FrameFormatError(f"frame has version {version}; this node speaks {VERSION}")
    if kind not in FrameKind.__members__.values():
        raise FrameFormatError(f"frame has kind {kind}; known: 1 HEADER, 2 CHUNK, 3 TRAILER")
    if reserved:
        raise FrameFormatError(f"frame's reserved field is {reserved:#x}; must be 0")
    if payload_bytes != len(message) - PREFIX_BYTES:
        raise FrameFormatError(
            f"frame says {payload_bytes} B of payload; {len(message) - PREFIX_BYTES} B came"
        )
    frame_kind = FrameKind(kind)
    _check_payload_bytes(frame_kind, payload_bytes)
    if frame_kind is not FrameKind.CHUNK and (layer or first_token or num_tokens):
        raise FrameFormatError(f"{frame_kind.name} frame with a layer or tokens; must be 0")
    payload = memoryview(message)[PREFIX_BYTES:]
    found = _checksum(payload)
    if found != expected:
        raise FrameChecksumError(
            layer=layer, first_token=first_token, expected=expected, found=found
        )
    return Frame(frame_kind, payload, layer, first_token, num_tokens)


def _checksum(payload: bytes | memoryview) -> int:
    return crc32c(np.frombuffer(payload, dtype=np.uint8))


def _check_payload_bytes(kind: FrameKind, payload_bytes: int) -> None:
    limit = MAX_HEADER_PAYLOAD_BYTES if kind is FrameKind.HEADER else MAX_FRAME_PAYLOAD_BYTES
    if payload_bytes > limit:
        raise FrameFormatError(f"{kind.name} frame of {payload_bytes} B; the limit is {limit}")


def take_message(assembler: HandoffAssembler, message: bytes) -> FrameKind:
    """Check one message of a hand-off and feed it to the assembler; returns what it was.

    Raises:
        HandoffError: the frame is damaged or out of order.
        LayoutMismatchError: the HEADER announces another model or layout.
    """
    frame = decode_frame(message)
    match frame.kind:
        case FrameKind.HEADER:
            assembler.take_header(parse_header(frame))
        case FrameKind.CHUNK:
            assembler.take_chunk(frame)
        case FrameKind.TRAILER:
            assembler.take_trailer(parse_trailer(frame))
    return frame.kind


def layout_to_proto(layout: KvLayout) -> handoff_pb2.Layout:
    """The message of a layout."""
    return handoff_pb2.Layout(
        model_name=layout.model_name,
        revision_hash=layout.revision_hash,
        kv_dtype=layout.kv_dtype,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        block_tokens=layout.block_tokens,
        rope_theta=layout.rope_theta,
        tokenizer_fingerprint=layout.tokenizer_fingerprint,
    )


def layout_from_proto(message: handoff_pb2.Layout) -> KvLayout:
    """The layout of a message."""
    return KvLayout(
        model_name=message.model_name,
        revision_hash=message.revision_hash,
        num_layers=message.num_layers,
        num_kv_heads=message.num_kv_heads,
        head_dim=message.head_dim,
        rope_theta=message.rope_theta,
        tokenizer_fingerprint=message.tokenizer_fingerprint,
        kv_dtype=message.kv_dtype,
        block_tokens=message.block_tokens,
    )


def header_frame(header: Header) -> Frame:
    """The first frame of a stream."""
    message = handoff_pb2.HandoffHeader(
        layout=layout_to_proto(header.layout),
        num_tokens=header.num_tokens,
        kv_from_token=header.kv_from_token,
        way=WAY_NUMBERS[header.way],
    )
    if (endpoint := header.endpoint) is not None:
        message.port = endpoint.port
        message.unix_name = endpoint.unix_name
        message.call_id = endpoint.call_id
        message.secret = endpoint.secret
        message.connections = endpoint.connections
        message.tls = endpoint.tls
    return Frame(FrameKind.HEADER, message.SerializeToString())


def trailer_frame(trailer: Trailer) -> Frame:
    """The last frame of a stream."""
    message = handoff_pb2.HandoffTrailer(
        first_token_id=trailer.first_token_id,
        queue_seconds=trailer.queue_seconds,
        prefill_seconds=trailer.prefill_seconds,
        num_chunks=trailer.num_chunks,
        payload_bytes=trailer.payload_bytes,
        prompt_profile=trailer.prompt_profile,
    )
    return Frame(FrameKind.TRAILER, message.SerializeToString())


def parse_header(frame: Frame) -> Header:
    """The announcement in a HEADER frame.

    Raises:
        FrameFormatError: not a HEADER, not a HandoffHeader message, or with a way or an endpoint
            that there cannot be.
    """
    message = handoff_pb2.HandoffHeader()
    _parse(frame, FrameKind.HEADER, message)
    return Header(
        layout_from_proto(message.layout),
        message.num_tokens,
        message.kv_from_token,
        _parse_endpoint(message),
    )


def _parse_endpoint(message: handoff_pb2.HandoffHeader) -> Endpoint | None:
    # A prefill node that knows no other way names none.
    if message.way == handoff_pb2.WAY_UNSPECIFIED:
        return None
    way = way_of(message.way)
    if way is None:
        raise FrameFormatError(f"HEADER has way {message.way}; known: {', '.join(Carrier)}")
    if way is Carrier.GRPC:
        return None
    for name, needed in (("call_id", CALL_ID_BYTES), ("secret", SECRET_BYTES)):
        if (length := len(getattr(message, name))) != needed:
            raise FrameFormatError(f"HEADER has a {name} of {length} B; need {needed}")
    if not 1 <= message.connections <= MAX_CONNECTIONS:
        raise FrameFormatError(
            f"HEADER asks for {message.connections} connections; must be 1 to {MAX_CONNECTIONS}"
        )
    if way is Carrier.SOCKETS and not 1 <= message.port <= MAX_PORT:
        raise FrameFormatError(f"HEADER has port {message.port}; must be 1 to {MAX_PORT}")
    if (
        way is Carrier.SHARED_MEMORY
        and not 1 <= len(message.unix_name.encode()) <= MAX_UNIX_NAME_BYTES
    ):
        raise FrameFormatError(
            f"HEADER has a unix_name of {len(message.unix_name.encode())} B; "
            f"must be 1 to {MAX_UNIX_NAME_BYTES}"
        )
    return Endpoint(
        way=way,
        call_id=message.call_id,
        secret=message.secret,
        connections=message.connections,
        port=message.port,
        unix_name=message.unix_name,
        tls=message.tls,
    )


def way_of(number: int) -> Carrier | None:
    """The way of a number in a message; None if this node knows none of that number."""
    return next((way for way, known in WAY_NUMBERS.items() if known == number), None)


def ways_from_proto(message: handoff_pb2.HandoffRequest) -> tuple[Carrier, ...]:
    """The ways that a decode node can; one that names none knows gRPC alone."""
    known = tuple(way for number in message.ways if (way := way_of(number)) is not None)
    return known if message.ways else (Carrier.GRPC,)


def parse_trailer(frame: Frame) -> Trailer:
    """The figures in a TRAILER frame.

    Raises:
        FrameFormatError: not a TRAILER, not a HandoffTrailer message, or seconds that are none.
    """
    message = handoff_pb2.HandoffTrailer()
    _parse(frame, FrameKind.TRAILER, message)
    for name in ("queue_seconds", "prefill_seconds"):
        # Written so that NaN is refused too.
        if not 0 <= (seconds := getattr(message, name)) < math.inf:
            raise FrameFormatError(f"TRAILER has {name} {seconds}; must be finite, 0 or more")
    return Trailer(
        first_token_id=message.first_token_id,
        queue_seconds=message.queue_seconds,
        prefill_seconds=message.prefill_seconds,
        num_chunks=message.num_chunks,
        payload_bytes=message.payload_bytes,
        prompt_profile=message.prompt_profile,
    )


def _parse(
    frame: Frame,
    kind: FrameKind,
    message: handoff_pb2.HandoffHeader | handoff_pb2.HandoffTrailer,
) -> None:
    if frame.kind is not kind:
        raise FrameFormatError(f"expected a {kind.name} frame, got {frame.kind.name}")
    try:
        message.ParseFromString(bytes(frame.payload))
    except DecodeError as error:
        raise FrameFormatError(f"{kind.name} frame holds no valid message: {error}") from None


def profile_window_from_proto(message: handoff_pb2.HandoffRequest) -> WindowSpec | None:
    """The default window that a profile is wanted for; None if none is wanted.

    Raises:
        InvalidRequestError: the window is impossible, or given without wanting a profile.
    """
    if not message.want_prompt_profile:
        if message.sink_tokens or message.recent_tokens:
            raise InvalidRequestError(
                "sink_tokens and recent_tokens are for a prompt profile; set want_prompt_profile, "
                "or leave them out"
            )
        return None
    try:
        return WindowSpec(message.sink_tokens, message.recent_tokens)
    except ShapeError as error:
        raise InvalidRequestError(f"the prompt profile's window: {error}") from None


def sampling_to_proto(params: SamplingParams) -> generate_pb2.Sampling:
    """The message of sampling parameters, every field set."""
    return generate_pb2.Sampling(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=params.seed,
    )


def sampling_from_proto(message: generate_pb2.Sampling) -> SamplingParams:
    """Sampling parameters of a message; what it leaves out keeps its default.

    Raises:
        SamplingError: a value is out of its range.
    """
    given = {field.name: value for field, value in message.ListFields()}
    return SamplingParams(**given)
