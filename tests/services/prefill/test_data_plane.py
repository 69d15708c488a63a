"""KV beside its call: the same frames as over the call, on the way that both nodes have; and
whatever breaks ends the call with a status that says so, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import chain
from pathlib import Path

import grpc
import pytest

from fluxion_core.config.carriers import Carrier
from fluxion_core.config.settings import ClientSettings, ServerSettings, ServerTlsSettings
from fluxion_core.errors import ConfigError
from fluxion_core.kernels import _native
from fluxion_core.kvstream.handoff import Endpoint, Frame, FrameKind, Header
from fluxion_core.wire import codec, plane
from fluxion_core.wire.channel import open_channel
from fluxion_proto.v1 import handoff_pb2, handoff_pb2_grpc
from services.prefill.config import PrefillHandoffSettings, PrefillNodeSettings
from services.prefill.data_plane import DataPlane
from tests.certificates import Authority
from tests.descriptors import open_descriptors, opened_since
from tests.services.prefill.receiver import admitted, dial, fetch, is_closed, say_hello

METHOD = "/fluxion.v1.Handoff/Prefill"
BESIDE = [Carrier.SHARED_MEMORY, Carrier.SOCKETS]


class Caller:
    """A decode node's calls."""

    def __init__(self, channel: grpc.aio.Channel, layout: handoff_pb2.Layout) -> None:
        self._channel, self._layout = channel, layout
        self.stub = handoff_pb2_grpc.PrefillNodeStub(channel)

    def call(self, ways: list[Carrier], num_tokens: int = 300, **fields) -> grpc.aio.Call:
        message = handoff_pb2.HandoffRequest(
            request_id="r",
            token_ids=[(7 * i) % 256 for i in range(num_tokens)],
            layout=self._layout,
            ways=[codec.WAY_NUMBERS[way] for way in ways],
            **{"machine": plane.machine_id(), "max_connections": 16, **fields},
        )
        return self._channel.unary_stream(METHOD)(message.SerializeToString())

    async def begin(self, ways: list[Carrier], *arguments, **fields):
        """A call, and the header that it was answered."""
        call = self.call(ways, *arguments, **fields)
        return call, codec.parse_header(codec.decode_frame(await call.read()))

    async def idle(self) -> None:
        """Wait until the node computes nothing."""
        while True:
            load = await self.stub.GetPrefillLoad(handoff_pb2.GetPrefillLoadRequest())
            if not (load.running_prompts or load.waiting_prompts or load.pending_tokens):
                return


@asynccontextmanager
async def calling(node) -> AsyncIterator[Caller]:
    async with open_channel(node.address, ClientSettings()) as channel:
        stub = handoff_pb2_grpc.PrefillNodeStub(channel)
        load = await stub.GetPrefillLoad(handoff_pb2.GetPrefillLoadRequest())
        yield Caller(channel, load.layout)


async def rest_of(call) -> list[Frame]:
    frames = []
    while (message := await call.read()) is not grpc.aio.EOF:
        frames.append(codec.decode_frame(message))
    return frames


async def failure_of(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await asyncio.wait_for(rest_of(call), 30)
    return failure.value


def by_place(frames: list[Frame]) -> list[Frame]:
    return sorted(frames, key=lambda frame: (frame.layer, frame.first_token))


@pytest.mark.parametrize("connections", [1, 2, 16])
@pytest.mark.parametrize("way", BESIDE)
async def test_the_frames_are_those_of_the_call(start_prefill, way: Carrier, connections: int):
    settings = PrefillHandoffSettings(connections=16)
    async with start_prefill(handoff=settings) as node, calling(node) as caller:
        header, *expected, last = await rest_of(caller.call([Carrier.GRPC], kv_from_token=32))
        assert codec.parse_header(header).endpoint is None
        call, answer = await caller.begin([way], kv_from_token=32, max_connections=connections)
        assert answer.way is way
        # As many as the decode node makes, and as there are layers to carry.
        assert answer.endpoint.connections == min(connections, 2)
        fetching = asyncio.ensure_future(fetch(answer))
        (trailer,) = await rest_of(call)
        fetched = await fetching
    for number, frames in enumerate(fetched):
        assert frames
        assert {frame.layer % answer.endpoint.connections for frame in frames} == {number}
        tokens = [(frame.layer, frame.first_token) for frame in frames]
        assert [sorted(tokens), len(set(tokens))] == [sorted(set(tokens)), len(tokens)]
        for layer in {frame.layer for frame in frames}:
            firsts = [frame.first_token for frame in frames if frame.layer == layer]
            assert firsts == sorted(firsts)
    assert by_place([*chain(*fetched)]) == by_place(expected)
    got, wanted = codec.parse_trailer(trailer), codec.parse_trailer(last)
    assert (got.first_token_id, got.num_chunks, got.payload_bytes) == (
        *(wanted.first_token_id, wanted.num_chunks, wanted.payload_bytes),
    )


@pytest.mark.parametrize(
    ("own", "asked", "fields", "chosen"),
    [
        ((*BESIDE, Carrier.GRPC), [Carrier.GRPC, *BESIDE], {}, Carrier.SHARED_MEMORY),
        ((Carrier.GRPC, *BESIDE), [*BESIDE, Carrier.GRPC], {}, Carrier.GRPC),
        ((*BESIDE, Carrier.GRPC), BESIDE, {"machine": "another"}, Carrier.SOCKETS),
        ((*BESIDE, Carrier.GRPC), BESIDE, {"machine": ""}, Carrier.SOCKETS),
        ((*BESIDE, Carrier.GRPC), [], {"max_connections": 0}, Carrier.GRPC),
    ],
    ids=["the node's first", "the node's order", "another machine", "unknown machine", "old peer"],
)
async def test_the_way_is_the_nodes_first_that_both_have(
    start_prefill, own: tuple, asked: list, fields: dict, chosen: Carrier, caplog
):
    caplog.set_level("INFO")
    async with (
        start_prefill(handoff=PrefillHandoffSettings(ways=own)) as node,
        calling(node) as caller,
    ):
        call, header = await caller.begin(asked, 40, **fields)
        assert header.way is chosen
        call.cancel()
        await caller.idle()
    assert f"way={chosen}" in caplog.text


@pytest.mark.parametrize(
    ("own", "asked", "fields", "words"),
    [
        ((Carrier.SOCKETS,), [], {}, "the decode node grpc; shared_memory is for"),
        ((Carrier.GRPC,), BESIDE, {}, "has grpc, the decode node shared_memory, sockets;"),
        ((Carrier.SHARED_MEMORY,), BESIDE, {"machine": "x"}, "for nodes on one machine"),
    ],
    ids=["old peer", "nothing in common", "another machine"],
)
async def test_without_a_way_in_common_the_call_is_refused_and_says_what_to_set(
    start_prefill, own: tuple, asked: list, fields: dict, words: str
):
    async with (
        start_prefill(handoff=PrefillHandoffSettings(ways=own)) as node,
        calling(node) as caller,
    ):
        failure = await failure_of(caller.call(asked, 40, **{"machine": "", **fields}))
    assert failure.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert words in failure.details()
    assert "set handoff.ways" in failure.details()


async def test_a_decode_node_that_makes_no_connection_is_refused(start_prefill):
    async with start_prefill() as node, calling(node) as caller:
        failure = await failure_of(caller.call(BESIDE, 40, max_connections=0))
        assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "max_connections is 0" in failure.details()


@pytest.mark.parametrize("way", BESIDE)
async def test_a_connection_that_breaks_ends_its_call_alone(start_prefill, way: Carrier):
    async with start_prefill(outgoing_bytes="16KiB") as node, calling(node) as caller:
        broken, header = await caller.begin([way], 2000)
        with await asyncio.to_thread(admitted, header.endpoint, 0):
            with await asyncio.to_thread(admitted, header.endpoint, 1) as other:
                other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            failure = await failure_of(broken)
        assert failure.code() is grpc.StatusCode.UNAVAILABLE
        assert f"a connection for the hand-off's KV ({way}) broke" in failure.details()
        call, header = await caller.begin([way])
        fetching = asyncio.ensure_future(fetch(header))
        assert (await rest_of(call))[-1].kind is FrameKind.TRAILER
        await fetching
        await caller.idle()


@pytest.mark.parametrize("connected", [False, True], ids=["that never comes", "that reads nothing"])
@pytest.mark.parametrize("way", BESIDE)
async def test_a_receiver_that_takes_nothing_holds_up_only_itself_and_is_ended(
    start_prefill, way: Carrier, connected: bool, caplog
):
    async with (
        start_prefill(outgoing_bytes="16KiB", max_running_prompts=1, unread_seconds=0.5) as node,
        calling(node) as caller,
    ):
        stalled = [await caller.begin([way], 2000, max_connections=1) for _ in range(3)]
        connections = []
        for _, header in stalled:
            if connected:
                connections.append(await asyncio.to_thread(admitted_small, header.endpoint))
        # Beside them: they have no place.
        call, header = await caller.begin([way])
        fetching = asyncio.ensure_future(fetch(header))
        assert (await rest_of(call))[-1].kind is FrameKind.TRAILER
        await fetching
        if not connected or way is Carrier.SHARED_MEMORY:
            for call, _ in stalled:
                failure = await failure_of(call)
                assert failure.code() is grpc.StatusCode.ABORTED
                assert "server.unread_seconds" in failure.details()
            await caller.idle()
            assert caplog.text.count("answer not taken") == 3
        for connection in connections:
            connection.close()


def admitted_small(endpoint: Endpoint) -> socket.socket:
    """A connection that reads nothing; of a ring, not even where it lies."""
    connection = dial(endpoint)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    say_hello(connection, endpoint, 0)
    return connection


@pytest.mark.parametrize("way", BESIDE)
async def test_the_end_of_a_call_is_the_end_of_its_connections_and_its_ticket(
    start_prefill, way: Carrier
):
    async with start_prefill(outgoing_bytes="16KiB") as node, calling(node) as caller:
        call, header = await caller.begin([way], 2000)
        before = open_descriptors()
        connection = await asyncio.to_thread(admitted, header.endpoint, 0)
        call.cancel()
        await asyncio.to_thread(read_to_the_end, connection)
        connection.close()
        with dial(header.endpoint) as late:
            say_hello(late, header.endpoint, 1)
            assert await asyncio.to_thread(is_closed, late)
        await caller.idle()
        assert not opened_since(before)
        # Nor the call's own, which were there when its header came.
        assert "anon_inode:[eventfd]" in {kind for _, kind in before - open_descriptors()}


def read_to_the_end(connection: socket.socket) -> None:
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass


async def test_a_ring_cannot_be_resized(start_prefill):
    async with start_prefill() as node, calling(node) as caller:
        call, header = await caller.begin([Carrier.SHARED_MEMORY], 40)
        with await asyncio.to_thread(admitted, header.endpoint, 0) as connection:
            message, descriptors, _, _ = await asyncio.to_thread(socket.recv_fds, connection, 16, 1)
            assert message[:4] == b"FUXM"
            for size in (0, 1 << 30):
                with pytest.raises(PermissionError):
                    os.ftruncate(descriptors[0], size)
            os.close(descriptors[0])
        call.cancel()
        await caller.idle()


async def test_hand_offs_and_refusals_are_counted(start_prefill, find_free_address):
    metrics = find_free_address()
    async with start_prefill(metrics_listen=metrics) as node, calling(node) as caller:
        for ways in ([Carrier.SOCKETS], [Carrier.SHARED_MEMORY], [Carrier.GRPC]):
            call, header = await caller.begin(ways)
            fetching = asyncio.ensure_future(fetch(header)) if header.endpoint else None
            trailer = codec.parse_trailer((await rest_of(call))[-1])
            if fetching is not None:
                await fetching
                with dial(header.endpoint) as late:
                    say_hello(late, header.endpoint, 0)
                    assert await asyncio.to_thread(is_closed, late)
        await caller.idle()
        text = await asyncio.to_thread(
            lambda: urllib.request.urlopen(f"http://{metrics}/metrics", timeout=30).read().decode()
        )
    for way in Carrier:
        assert f'fluxion_prefill_handoffs_total{{way="{way}"}} 1.0' in text
        taken = f'fluxion_prefill_taken_bytes_total{{way="{way}"}} {float(trailer.payload_bytes)}'
        assert taken in text
    assert 'fluxion_prefill_refused_connections_total{reason="ticket"} 2.0' in text
    assert 'fluxion_data_plane_cpu_seconds_total{kind="prefill"}' in text


async def test_the_data_port_is_the_one_that_was_set(start_prefill, find_free_address):
    address = find_free_address()
    settings = PrefillHandoffSettings(listen=address, ways=(Carrier.SOCKETS,))
    async with start_prefill(handoff=settings) as node, calling(node) as caller:
        call, header = await caller.begin([Carrier.SOCKETS], 40)
        assert header == Header(header.layout, 40, 0, header.endpoint)
        assert f"127.0.0.1:{header.endpoint.port}" == address
        assert not header.endpoint.unix_name
        call.cancel()
        await caller.idle()


async def test_without_openssl_a_node_under_tls_offers_no_sockets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(_native, "tls_missing", lambda: "libssl.so.3: no such file")
    certificate, key = Authority(tmp_path).issue("prefill")
    server = ServerSettings(tls=ServerTlsSettings(certificate=certificate, key=key))
    for ways in (BESIDE, [Carrier.SOCKETS, Carrier.GRPC]):
        handoff = PrefillHandoffSettings(ways=tuple(ways))
        with pytest.raises(ConfigError, match="no such file; install OpenSSL 3"):
            DataPlane(PrefillNodeSettings(server=server, handoff=handoff)).start()
    handoff = PrefillHandoffSettings(ways=(Carrier.SHARED_MEMORY, Carrier.GRPC))
    without_sockets = DataPlane(PrefillNodeSettings(server=server, handoff=handoff))
    without_sockets.start()
    await without_sockets.stop()
