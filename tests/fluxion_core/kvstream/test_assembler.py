"""Only whole streams get through: any loss, repeat, swap or cut is found."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxion_core.config.carriers import Carrier
from fluxion_core.errors import (
    FluxionError,
    FrameFormatError,
    HandoffError,
    LayoutMismatchError,
    StreamTruncatedError,
)
from fluxion_core.kvstream.assembler import HandoffAssembler
from fluxion_core.kvstream.handoff import Endpoint, Frame, FrameKind, Header, KvLayout, Trailer

LAYOUT = KvLayout(
    "toy",
    "ab12",
    num_layers=2,
    num_kv_heads=1,
    head_dim=16,
    rope_theta=1e4,
    tokenizer_fingerprint="cd34",
)
NUM_TOKENS = 70


class Recorder:
    def __init__(self) -> None:
        self.written: list[tuple[int, int, int]] = []

    def write_blocks(self, layer, first_token, num_tokens, payload) -> None:
        self.written.append((layer, first_token, num_tokens))


def chunk(layer: int, first: int, count: int) -> Frame:
    return Frame(FrameKind.CHUNK, bytes(LAYOUT.payload_bytes(count)), layer, first, count)


def whole_stream(kv_from_token: int = 0) -> list[object]:
    chunks = [
        chunk(layer, first, min(32, NUM_TOKENS - first))
        for first in range(kv_from_token, NUM_TOKENS, 32)
        for layer in range(2)
    ]
    total = sum(len(frame.payload) for frame in chunks)
    trailer = Trailer(1, 0.0, 0.0, len(chunks), total)
    return [Header(LAYOUT, NUM_TOKENS, kv_from_token), *chunks, trailer]


def feed(items: list[object], kv_from_token: int = 0) -> Recorder:
    sink = Recorder()
    assembler = HandoffAssembler(sink, LAYOUT, num_tokens=NUM_TOKENS, kv_from_token=kv_from_token)
    for item in items:
        match item:
            case Header():
                assembler.take_header(item)
            case Trailer():
                assembler.take_trailer(item)
            case Frame():
                assembler.take_chunk(item)
    assembler.finish()
    return sink


@pytest.mark.parametrize("kv_from_token", [0, 32, 64])
def test_a_whole_stream_reaches_the_sink_in_order(kv_from_token: int):
    sink = feed(whole_stream(kv_from_token), kv_from_token)
    for layer in range(2):
        runs = [(first, count) for row, first, count in sink.written if row == layer]
        assert runs[0][0] == kv_from_token
        assert sum(count for _, count in runs) == NUM_TOKENS - kv_from_token


def test_a_layer_of_a_chunk_counts_for_its_share_of_the_tokens():
    # By hand: of two layers, one with 32 tokens more is 16 tokens more.
    assembler = HandoffAssembler(Recorder(), LAYOUT, num_tokens=NUM_TOKENS, kv_from_token=32)
    assembler.take_header(Header(LAYOUT, NUM_TOKENS, 32))
    taken = [assembler.tokens_taken]
    for frame in (chunk(0, 32, 32), chunk(1, 32, 32), chunk(0, 64, 6), chunk(1, 64, 6)):
        assembler.take_chunk(frame)
        taken.append(assembler.tokens_taken)
    assert taken == [32, 48, 64, 67, 70]


@given(st.randoms(use_true_random=False))
def test_layers_may_interleave_at_will(random):
    header, *chunks, trailer = whole_stream()
    order = [frame.layer for frame in chunks]
    random.shuffle(order)
    queues = {layer: [f for f in chunks if f.layer == layer] for layer in range(2)}
    feed([header, *(queues[layer].pop(0) for layer in order), trailer])


@settings(max_examples=300)
@given(
    kind=st.sampled_from(["drop", "repeat", "swap", "cut"]),
    at=st.integers(0, 7),
    other=st.integers(0, 7),
)
def test_any_damage_is_found(kind: str, at: int, other: int):
    items = whole_stream()
    assert len(items) == 8
    match kind:
        case "drop":
            del items[at]
        case "repeat":
            items.insert(other, items[at])
        case "swap":
            if at == other:
                return
            items[at], items[other] = items[other], items[at]
            # Frames of different layers may change places, if each layer keeps its order.
            first, second = sorted((at, other))
            layers = [f.layer for f in items[first : second + 1] if isinstance(f, Frame)]
            inside = first > 0 and second < 7
            if inside and second - first == 1 and layers[0] != layers[1]:
                feed(items)
                return
        case "cut":
            items = items[:at]
    with pytest.raises(HandoffError):
        feed(items)


@pytest.mark.parametrize(
    "bad",
    [
        chunk(2, 0, 32),
        chunk(0, 0, 0),
        chunk(0, 0, 24),
        chunk(0, 0, 80),
        Frame(FrameKind.CHUNK, b"", 0, 0, 32),
        Frame(FrameKind.HEADER, b""),
    ],
)
def test_chunks_that_do_not_fit_are_refused(bad: Frame):
    with pytest.raises(HandoffError):
        feed([whole_stream()[0], bad])


def test_a_header_for_something_else_is_refused():
    for header in (Header(LAYOUT, 71, 0), Header(LAYOUT, NUM_TOKENS, 16)):
        with pytest.raises(HandoffError):
            feed([header])
    with pytest.raises(LayoutMismatchError, match="head_dim"):
        feed([Header(replace(LAYOUT, head_dim=32), NUM_TOKENS, 0)])


def test_trailer_counts_are_checked():
    *rest, trailer = whole_stream()
    with pytest.raises(FluxionError, match="counts"):
        feed([*rest, replace(trailer, num_chunks=5)])


def test_only_names_for_people_may_differ():
    LAYOUT.check_compatible(replace(LAYOUT, model_name="another"))
    with pytest.raises(LayoutMismatchError, match="revision_hash"):
        LAYOUT.check_compatible(replace(LAYOUT, revision_hash="ff"))


BESIDE = Header(LAYOUT, NUM_TOKENS, 0, Endpoint(Carrier.SOCKETS, bytes(16), bytes(32), 4, port=7))


def take(items: list[object], landing: tuple[int, int] | None) -> HandoffAssembler:
    """Feed a stream whose KV lands beside it after so many of its items, if it does."""
    assembler = HandoffAssembler(Recorder(), LAYOUT, num_tokens=NUM_TOKENS, kv_from_token=0)
    for item in items:
        match item:
            case Header():
                assembler.take_header(item)
            case Trailer():
                assembler.take_trailer(item)
            case Frame():
                assembler.take_chunk(item)
            case "landing":
                assert landing is not None
                assembler.take_landing(*landing)
    assembler.finish()
    return assembler


def test_kv_that_lands_beside_its_call_may_be_whole_before_or_after_the_trailer():
    trailer = Trailer(1, 0.0, 0.0, 6, 600)
    for items in ([BESIDE, trailer, "landing"], [BESIDE, "landing", trailer]):
        assembler = take(items, (6, 600))
        assert assembler.endpoint == BESIDE.endpoint
        assert (assembler.num_chunks, assembler.payload_bytes) == (6, 600)
        assert assembler.tokens_taken == NUM_TOKENS


def test_kv_that_was_to_land_beside_its_call_and_did_not_is_missed():
    trailer = Trailer(1, 0.0, 0.0, 6, 600)
    with pytest.raises(StreamTruncatedError, match="layer 0 holds 0 of 70"):
        take([BESIDE, trailer], None)
    with pytest.raises(StreamTruncatedError, match="before its TRAILER"):
        take([BESIDE, "landing"], (6, 600))
    with pytest.raises(FrameFormatError, match="counts 6 chunks of 600 B; 5 of 600 B came"):
        take([BESIDE, trailer, "landing"], (5, 600))
    with pytest.raises(FrameFormatError, match="6 of 601 B came"):
        take([BESIDE, trailer, "landing"], (6, 601))
    with pytest.raises(FrameFormatError, match="comes over its connections"):
        take([BESIDE, chunk(0, 0, 32)], None)
    with pytest.raises(FrameFormatError, match="second"):
        take([BESIDE, trailer, trailer], None)
