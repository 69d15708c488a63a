"""Hand-off streams, damaged, into a real host KV store; what gets through must be whole."""

from __future__ import annotations

import struct
from math import inf
from random import Random

import google_crc32c
import numpy as np
import torch

from fluxion_core.errors import FluxionError, FrameFormatError
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.kvstream.assembler import HandoffAssembler
from fluxion_core.kvstream.handoff import Frame, FrameKind, Header, KvLayout, Trailer
from fluxion_core.planning import prompt_profile
from fluxion_core.wire import codec
from fluxion_proto.v1 import handoff_pb2
from tests.fuzz.harness import Outcome, ViolationError
from tests.fuzz.mutate import mutate_bytes, odd_integer, odd_text

GEOMETRY = KvGeometry(2, 2, 16, 128, 16)
LAYOUT = KvLayout("toy", "ab12", 2, 2, 16, 1e4, "cd34")
NUM_HEADS = 4
VOCAB_SIZE = 256
_LENGTHS = (1, 2, 15, 16, 17, 31, 33, 64, 100, 127, 128, 129, 200, 256, 300)
_PROFILE_BYTES = prompt_profile.packed_bytes(2, NUM_HEADS, 2)
_PREFIX = struct.Struct("<IHHIIIIII")
_FIELD_BITS = (32, 16, 16, 32, 32, 32, 32, 32, 32)
_PAYLOAD_BYTES_FIELD, _CRC_FIELD = 6, 7


_INFINITY = 0x7F80
"""In bfloat16; NaN has all its bits too."""


def finite_noise(num_bytes: int) -> bytes:
    """Random bfloat16 values, all of them finite."""
    values = np.frombuffer(Random(0).randbytes(num_bytes), np.uint16).copy()
    values[values & _INFINITY == _INFINITY] ^= 0x0080
    return values.tobytes()


class HandoffStreams:
    """Whole streams with a few changes each; every tenth has none and must be accepted."""

    name = "handoff"
    unit = "frames"

    def __init__(self) -> None:
        self._store = HostKvStore(GEOMETRY, 4 << 20, model_key=b"toy")
        self._noise = finite_noise(1 << 16)

    def close(self) -> None:
        """Nothing is held between cases."""

    def run(self, random: Random) -> Outcome:
        """One stream into one reservation."""
        # Few prompts, so that some find the beginning of an earlier one in the store.
        prompt, num_tokens = random.randrange(4), random.choice(_LENGTHS)
        token_ids = [(prompt + 7 * index) % VOCAB_SIZE for index in range(num_tokens)]
        sequence = self._store.reserve(token_ids, random.randrange(40))
        wants_profile = random.random() < 0.3
        try:
            messages = whole_stream(
                random, num_tokens, sequence.kv_from_token, self._noise, wants_profile=wants_profile
            )
            is_damaged = random.random() < 0.9
            if is_damaged:
                for _ in range(random.choice((1, 1, 1, 2, 3))):
                    messages = damage(random, messages)
            taken = [0]
            try:
                receive(messages, sequence, taken, wants_profile=wants_profile)
            except FluxionError as error:
                if not is_damaged:
                    raise ViolationError(f"a whole stream was refused: {error}") from error
                result = type(error).__name__
            else:
                result = "accepted"
                # A commit may swap a slab for one that holds the same tokens already.
                self._check_stored(sequence, messages)
                sequence.commit()
        finally:
            sequence.release()
        self._check_nothing_is_held()
        return Outcome(result, taken[0], sum(map(len, messages)))

    def _check_stored(self, sequence: SequenceKv, messages: list[bytes]) -> None:
        """Every token of every layer came once, in order, and lies in the store as it was sent."""
        expected = [sequence.kv_from_token] * GEOMETRY.num_layers
        for message in messages:
            _, _, kind, layer, first, count, size, crc, _ = _PREFIX.unpack_from(message)
            payload = message[_PREFIX.size :]
            if (size, crc) != (len(payload), google_crc32c.value(payload)):
                raise ViolationError("a damaged frame was accepted")
            if kind != FrameKind.CHUNK:
                continue
            if first != expected[layer]:
                raise ViolationError(f"layer {layer} has a gap at {expected[layer]}")
            expected[layer] = first + count
            self._check_same(sequence, layer, first, count, payload)
        if expected != [sequence.num_prompt_tokens] * GEOMETRY.num_layers:
            raise ViolationError(f"{expected} of {sequence.num_prompt_tokens} tokens are whole")

    def _check_same(
        self, sequence: SequenceKv, layer: int, first: int, count: int, payload: bytes
    ) -> None:
        """The tokens of a CHUNK lie in their slabs bit by bit; what fills up a block may not."""
        shape = (GEOMETRY.num_kv_heads, -1, 2, BLOCK_TOKENS, GEOMETRY.head_dim)
        sent = np.frombuffer(payload, np.int16).reshape(shape)
        for index in range(sent.shape[1]):
            slab, block = divmod(first // BLOCK_TOKENS + index, GEOMETRY.slab_blocks)
            stored = self._store.slab_kv(sequence.slabs[slab])[layer, :, block]
            rows = min(BLOCK_TOKENS, count - index * BLOCK_TOKENS)
            found = stored.view(torch.int16).numpy()
            if not np.array_equal(found[:, :, :rows], sent[:, index, :, :rows]):
                raise ViolationError(
                    f"layer {layer} holds other KV from token {first} than was sent"
                )
            if (found[:, :, :rows] & _INFINITY == _INFINITY).any():
                raise ViolationError(f"layer {layer} holds KV that is not finite")

    def _check_nothing_is_held(self) -> None:
        found = self._store.statistics()
        if found.reserved_bytes or found.used_bytes or found.sequences:
            raise ViolationError(f"something is still held: {found}")
        if found.free_bytes + found.cached_bytes != found.capacity_bytes:
            raise ViolationError(f"the accounting does not add up: {found}")


def receive(
    messages: list[bytes], sequence: SequenceKv, taken: list[int], *, wants_profile: bool
) -> None:
    """What a decode node does with a stream's messages before it commits; `taken` counts them.

    Raises:
        FluxionError: the stream is not whole.
    """
    assembler = HandoffAssembler(
        sequence,
        LAYOUT,
        num_tokens=sequence.num_prompt_tokens,
        kv_from_token=sequence.kv_from_token,
    )
    for message in messages:
        taken[0] += 1
        codec.take_message(assembler, message)
    trailer = assembler.finish()
    if not all(0 <= seconds < inf for seconds in (trailer.queue_seconds, trailer.prefill_seconds)):
        raise ViolationError(f"seconds that are none were accepted: {trailer}")
    if trailer.first_token_id >= VOCAB_SIZE:
        raise FrameFormatError("first token outside of the vocabulary")
    if wants_profile:
        prompt_profile.unpack(
            trailer.prompt_profile, num_layers=2, num_heads=NUM_HEADS, num_kv_heads=2
        )
    elif trailer.prompt_profile:
        raise FrameFormatError("a profile that was not asked for")


def whole_stream(
    random: Random, num_tokens: int, kv_from_token: int, noise: bytes, *, wants_profile: bool
) -> list[bytes]:
    """The messages of a stream as a prefill node sends it, with layers interleaved at will."""
    queues = []
    for layer in range(LAYOUT.num_layers):
        frames, first = [], kv_from_token
        while first < num_tokens:
            count = min(num_tokens - first, BLOCK_TOKENS * random.randint(1, 8))
            size = LAYOUT.payload_bytes(count)
            at = 2 * random.randrange((len(noise) - size) // 2)
            frames.append(Frame(FrameKind.CHUNK, noise[at : at + size], layer, first, count))
            first += count
        queues.append(frames)
    chunks = []
    while any(queues):
        chunks.append(random.choice([queue for queue in queues if queue]).pop(0))
    trailer = Trailer(
        first_token_id=random.randrange(VOCAB_SIZE),
        queue_seconds=0.5,
        prefill_seconds=1.5,
        num_chunks=len(chunks),
        payload_bytes=sum(len(frame.payload) for frame in chunks),
        prompt_profile=bytes(_PROFILE_BYTES) if wants_profile else b"",
    )
    frames = [
        codec.header_frame(Header(LAYOUT, num_tokens, kv_from_token)),
        *chunks,
        codec.trailer_frame(trailer),
    ]
    return [codec.encode_frame(frame) for frame in frames]


def damage(random: Random, messages: list[bytes]) -> list[bytes]:
    """One change: to the order of frames, to a prefix, to a payload, or to a message in it."""
    messages = list(messages)
    if not messages:
        return [random.randbytes(random.randrange(100))]
    at = random.randrange(len(messages))
    message = messages[at]
    match random.randrange(12):
        case 0:
            del messages[at]
        case 1:
            messages.insert(random.randint(0, len(messages)), message)
        case 2:
            other = random.randrange(len(messages))
            messages[at], messages[other] = messages[other], message
        case 3:
            del messages[at:]
        case 4:
            messages[at] = mutate_bytes(random, message)
        case 5:
            messages[at] = rebuilt(message, mutate_bytes(random, message[_PREFIX.size :]))
        case 6 | 7 | 8:
            messages[at] = with_odd_field(random, message)
        case 9:
            messages[at] = with_not_finite(random, message)
        case _:
            at = random.choice((0, len(messages) - 1))
            messages[at] = _with_odd_message(random, messages[at])
    return messages


def rebuilt(message: bytes, payload: bytes) -> bytes:
    """The prefix, as far as there is one, with the length and checksum of another payload."""
    fields = list(_PREFIX.unpack_from(message[: _PREFIX.size].ljust(_PREFIX.size, b"\0")))
    fields[_PAYLOAD_BYTES_FIELD] = len(payload)
    fields[_CRC_FIELD] = google_crc32c.value(payload)
    return _PREFIX.pack(*fields) + payload


def with_not_finite(random: Random, message: bytes) -> bytes:
    """One value is NaN or an infinity; it may be one that only fills up a block."""
    payload = bytearray(message[_PREFIX.size :])
    if len(payload) > 1:
        at = 2 * random.randrange(len(payload) // 2)
        payload[at : at + 2] = random.choice((b"\x80\x7f", b"\x80\xff", b"\x81\x7f", b"\xff\xff"))
    return rebuilt(message, bytes(payload))


def with_odd_field(random: Random, message: bytes) -> bytes:
    """One number of the prefix is an odd one."""
    fields = list(_PREFIX.unpack_from(message[: _PREFIX.size].ljust(_PREFIX.size, b"\0")))
    index = random.randrange(len(fields))
    fields[index] = odd_integer(random, _FIELD_BITS[index], fields[index])
    return _PREFIX.pack(*fields) + message[_PREFIX.size :]


def _with_odd_message(random: Random, message: bytes) -> bytes:
    """A HEADER or TRAILER that says something else, checksum and all."""
    kind = handoff_pb2.HandoffHeader if random.random() < 0.5 else handoff_pb2.HandoffTrailer
    try:
        content = kind.FromString(message[_PREFIX.size :])
    except Exception:
        content = kind()
    set_odd_field(random, content)
    return rebuilt(message, content.SerializeToString())


def set_odd_field(random: Random, message) -> None:
    """Give one field of a protobuf message, at any depth, an odd value."""
    field = random.choice(message.DESCRIPTOR.fields)
    is_list = field.is_repeated
    if field.message_type is not None:
        if is_list:
            inner = getattr(message, field.name).add()
        else:
            inner = getattr(message, field.name)
            inner.SetInParent()
        if random.random() < 0.9:
            set_odd_field(random, inner)
        return
    if random.random() < 0.1:
        message.ClearField(field.name)
        return
    count = random.choice((1, 1, 2, 20, 300)) if is_list else 1
    values = [_odd_scalar(random, field) for _ in range(count)]
    if is_list:
        getattr(message, field.name).extend(values)
    else:
        setattr(message, field.name, values[0])


def _odd_scalar(random: Random, field) -> object:
    match field.cpp_type:
        case field.CPPTYPE_UINT32:
            return odd_integer(random, 32)
        case field.CPPTYPE_UINT64:
            return odd_integer(random, 64)
        case field.CPPTYPE_ENUM:
            return random.choice((0, 1, 2, 3, 4, 5, 77, -1, 2**31 - 1))
        case field.CPPTYPE_DOUBLE | field.CPPTYPE_FLOAT:
            nan, inf = float("nan"), float("inf")
            return random.choice((0.0, -0.0, 0.5, 1.0, -1.0, 2.5, 1e-38, 3e38, nan, inf, -inf))
        case field.CPPTYPE_BOOL:
            return random.random() < 0.5
        case _ if field.type == field.TYPE_BYTES:
            return random.randbytes(random.choice((0, 1, 4, _PROFILE_BYTES, _PROFILE_BYTES + 1)))
        case _:
            return odd_text(random).replace("\ud7ff", "")
