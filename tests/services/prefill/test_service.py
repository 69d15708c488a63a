"""The prefill node over real gRPC: what it streams, when, and what it refuses."""

from __future__ import annotations

import asyncio
import threading
import urllib.request

import grpc
import pytest

from fluxion_core.config.settings import ClientSettings
from fluxion_core.kvstream.handoff import FrameKind
from fluxion_core.planning.prompt_profile import unpack
from fluxion_core.prompt.capture import KvCapture
from fluxion_core.wire import codec
from fluxion_core.wire.channel import open_channel
from fluxion_proto.v1 import handoff_pb2, handoff_pb2_grpc

METHOD = "/fluxion.v1.Handoff/Prefill"


async def layout_of(channel: grpc.aio.Channel) -> handoff_pb2.Layout:
    stub = handoff_pb2_grpc.PrefillNodeStub(channel)
    return (await stub.GetPrefillLoad(handoff_pb2.GetPrefillLoadRequest())).layout


def request_of(layout: handoff_pb2.Layout, num_tokens: int, **fields) -> bytes:
    tokens = [(7 * i) % 256 for i in range(num_tokens)]
    return handoff_pb2.HandoffRequest(
        request_id="r", token_ids=tokens, layout=layout, **fields
    ).SerializeToString()


async def frames_of(channel, message: bytes) -> list:
    call = channel.unary_stream(METHOD)(message)
    return [codec.decode_frame(frame) async for frame in call]


@pytest.mark.parametrize(("num_tokens", "kv_from_token"), [(1, 0), (16, 0), (200, 0), (200, 128)])
async def test_every_layer_of_every_token_comes_once_in_order(
    start_prefill, num_tokens: int, kv_from_token: int
):
    async with start_prefill() as node, open_channel(node.address, ClientSettings()) as channel:
        message = request_of(await layout_of(channel), num_tokens, kv_from_token=kv_from_token)
        frames = await frames_of(channel, message)
    assert frames[0].kind is FrameKind.HEADER
    assert frames[-1].kind is FrameKind.TRAILER
    for layer in range(2):
        expected = kv_from_token
        for frame in frames[1:-1]:
            if frame.layer == layer:
                assert frame.first_token == expected
                expected += frame.num_tokens
        assert expected == num_tokens
    trailer = codec.parse_trailer(frames[-1])
    assert trailer.num_chunks == len(frames) - 2
    assert trailer.payload_bytes == sum(len(frame.payload) for frame in frames[1:-1])


async def test_a_profile_comes_with_the_trailer_if_it_is_wanted(start_prefill):
    shape = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    wanted = {"want_prompt_profile": True, "sink_tokens": 64, "recent_tokens": 128}
    async with start_prefill() as node, open_channel(node.address, ClientSettings()) as channel:
        layout = await layout_of(channel)

        async def profile(num_tokens: int, **fields) -> bytes:
            frames = await frames_of(channel, request_of(layout, num_tokens, **fields))
            return codec.parse_trailer(frames[-1]).prompt_profile

        assert await profile(300) == b""
        for num_tokens in (1, 300):
            assert len(unpack(await profile(num_tokens, **wanted), **shape)) == 2
        # The decode node holds what comes before; the profile is of the whole prompt all the same.
        assert await profile(300, **wanted, kv_from_token=256) == await profile(300, **wanted)
        assert await profile(300, **{**wanted, "sink_tokens": 32}) != await profile(300, **wanted)


async def test_chunking_does_not_change_the_first_token(start_prefill):
    first_tokens = set()
    for chunk_tokens in (16, 64, 512):
        async with (
            start_prefill(chunk_tokens=chunk_tokens) as node,
            open_channel(node.address, ClientSettings()) as channel,
        ):
            frames = await frames_of(channel, request_of(await layout_of(channel), 300))
            first_tokens.add(codec.parse_trailer(frames[-1]).first_token_id)
    assert len(first_tokens) == 1


async def test_the_first_kv_frame_is_on_the_wire_before_the_last_layer_is_computed(
    start_prefill, monkeypatch: pytest.MonkeyPatch
):
    may_go_on = threading.Event()
    original = KvCapture.attend

    def gated(self, layer, query, key, value):
        # The last layer of the first chunk waits until the client has the first layer's KV. If no
        # frame left before that, the client would wait for ever, and so would this.
        if layer == 1:
            assert may_go_on.wait(timeout=60)
        return original(self, layer, query, key, value)

    async with start_prefill() as node, open_channel(node.address, ClientSettings()) as channel:
        message = request_of(await layout_of(channel), 64)
        monkeypatch.setattr(KvCapture, "attend", gated)
        call = aiter(channel.unary_stream(METHOD)(message))
        header = codec.decode_frame(await anext(call))
        first = codec.decode_frame(await anext(call))
        assert not may_go_on.is_set()
        assert (header.kind, first.kind, first.layer) == (FrameKind.HEADER, FrameKind.CHUNK, 0)
        may_go_on.set()
        rest = [codec.decode_frame(frame) async for frame in call]
        assert rest[-1].kind is FrameKind.TRAILER


async def test_prompts_at_once_get_what_they_get_alone(start_prefill):
    async with start_prefill() as node, open_channel(node.address, ClientSettings()) as channel:
        layout = await layout_of(channel)
        messages = [request_of(layout, count) for count in (500, 40, 130, 300)]
        alone = [await frames_of(channel, message) for message in messages]
        together = await asyncio.gather(*(frames_of(channel, message) for message in messages))
    for one, other in zip(alone, together, strict=True):
        assert one[1:-1] == other[1:-1]
        tokens = [codec.parse_trailer(frames[-1]).first_token_id for frames in (one, other)]
        assert tokens[0] == tokens[1]


async def test_a_receiver_that_does_not_read_holds_up_only_itself(start_prefill):
    async with (
        start_prefill(outgoing_bytes="16KiB") as node,
        open_channel(node.address, ClientSettings()) as channel,
    ):
        layout = await layout_of(channel)
        slow = aiter(channel.unary_stream(METHOD)(request_of(layout, 2000)))
        await anext(slow)
        await frames_of(channel, request_of(layout, 300))
        rest = [codec.decode_frame(frame) async for frame in slow]
        assert rest[-1].kind is FrameKind.TRAILER


async def test_a_hand_off_of_which_nothing_is_taken_is_ended_and_counted(
    start_prefill, find_free_address, caplog
):
    no_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 8192)]
    metrics = find_free_address()
    async with (
        start_prefill(
            outgoing_bytes="16KiB",
            max_running_prompts=1,
            unread_seconds=0.5,
            metrics_listen=metrics,
        ) as node,
        open_channel(node.address, ClientSettings()) as channel,
        grpc.aio.insecure_channel(node.address, options=no_window) as unread,
    ):
        layout = await layout_of(channel)
        stalled = [aiter(unread.unary_stream(METHOD)(request_of(layout, 2000))) for _ in range(3)]
        for call in stalled:
            await anext(call)
        # Beside them: they have no place.
        await frames_of(channel, request_of(layout, 300))
        stub = handoff_pb2_grpc.PrefillNodeStub(channel)
        while (await stub.GetPrefillLoad(handoff_pb2.GetPrefillLoadRequest())).pending_tokens:
            pass
        assert caplog.text.count("answer not taken method=/fluxion.v1.Handoff/Prefill") == 3
        for call in stalled:
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                async for _ in call:
                    pass
            assert failure.value.code() is grpc.StatusCode.ABORTED
        text = await asyncio.to_thread(
            lambda: urllib.request.urlopen(f"http://{metrics}/metrics", timeout=30).read().decode()
        )
        assert 'fluxion_unread_calls_total{kind="prefill"} 3.0' in text
        assert 'fluxion_prefill_prompts_total{outcome="failed",status="ABORTED"} 3.0' in text


async def test_a_node_says_what_a_prompt_of_a_given_length_would_wait_for(start_prefill):
    no_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 8192)]
    async with (
        start_prefill(outgoing_bytes="16KiB") as node,
        open_channel(node.address, ClientSettings()) as channel,
        grpc.aio.insecure_channel(node.address, options=no_window) as unread,
    ):
        stub = handoff_pb2_grpc.PrefillNodeStub(channel)
        load = await stub.GetPrefillLoad(handoff_pb2.GetPrefillLoadRequest())
        assert not load.HasField("tokens_before")
        assert not load.HasField("seconds_before")
        layout = await layout_of(channel)
        await frames_of(channel, request_of(layout, 300))
        load = await stub.GetPrefillLoad(handoff_pb2.GetPrefillLoadRequest(prompt_tokens=300))
        assert (load.HasField("seconds_before"), load.seconds_before) == (True, 0.0)
        call = unread.unary_stream(METHOD)(request_of(layout, 2000))
        await anext(aiter(call))
        load = await stub.GetPrefillLoad(handoff_pb2.GetPrefillLoadRequest(prompt_tokens=2000))
        assert 0 < load.tokens_before <= load.pending_tokens
        assert load.seconds_before > 0
        call.cancel()


async def test_a_cancelled_stream_ends_its_prompt(start_prefill):
    async with start_prefill() as node, open_channel(node.address, ClientSettings()) as channel:
        layout = await layout_of(channel)
        call = channel.unary_stream(METHOD)(request_of(layout, 2000))
        await call.read()
        call.cancel()
        stub = handoff_pb2_grpc.PrefillNodeStub(channel)
        while True:
            load = await stub.GetPrefillLoad(handoff_pb2.GetPrefillLoadRequest())
            if load.running_prompts == load.waiting_prompts == 0:
                break
        assert load.pending_tokens == 0


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"token_ids": []}, grpc.StatusCode.INVALID_ARGUMENT, "empty"),
        ({"token_ids": [1, 256]}, grpc.StatusCode.INVALID_ARGUMENT, "256"),
        ({"token_ids": [1] * 2049}, grpc.StatusCode.INVALID_ARGUMENT, "2048"),
        ({"kv_from_token": 8}, grpc.StatusCode.INVALID_ARGUMENT, "kv_from_token"),
        ({"kv_from_token": 48}, grpc.StatusCode.INVALID_ARGUMENT, "kv_from_token"),
        ({"want_prompt_profile": True}, grpc.StatusCode.INVALID_ARGUMENT, "sink_tokens is 0"),
        ({"recent_tokens": 256}, grpc.StatusCode.INVALID_ARGUMENT, "want_prompt_profile"),
        ({"revision_hash": "other"}, grpc.StatusCode.FAILED_PRECONDITION, "revision_hash"),
        ({"num_layers": 3}, grpc.StatusCode.FAILED_PRECONDITION, "num_layers"),
        ({"tokenizer_fingerprint": "x"}, grpc.StatusCode.FAILED_PRECONDITION, "tokenizer"),
    ],
)
async def test_bad_requests_are_refused_before_any_byte(
    start_prefill, change: dict, status: grpc.StatusCode, words: str
):
    async with start_prefill() as node, open_channel(node.address, ClientSettings()) as channel:
        request = handoff_pb2.HandoffRequest.FromString(request_of(await layout_of(channel), 40))
        for name, value in change.items():
            if name == "token_ids":
                request.token_ids[:] = value
            elif name in request.DESCRIPTOR.fields_by_name:
                setattr(request, name, value)
            else:
                setattr(request.layout, name, value)
        call = channel.unary_stream(METHOD)(request.SerializeToString())
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call.read()
        assert failure.value.code() is status
        assert words in failure.value.details()
        with pytest.raises(grpc.aio.AioRpcError) as garbage:
            await channel.unary_stream(METHOD)(b"\xff\xff garbage").read()
        assert garbage.value.code() is grpc.StatusCode.INVALID_ARGUMENT
