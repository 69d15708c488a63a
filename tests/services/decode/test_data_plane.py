"""KV beside its call, over real sockets: what is taken, what is refused, and what is left after it.

The prefill node here stands before a real one, whose frames it sends over connections of its own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import grpc
import pytest

from fluxion_core.config.carriers import Carrier
from fluxion_core.config.settings import ClientSettings, ClientTlsSettings, HandoffSettings
from fluxion_core.errors import ConfigError, PeerUnavailableError
from fluxion_core.geometry import KvGeometry
from fluxion_core.kvstream.handoff import Endpoint, Frame
from fluxion_core.wire import codec
from fluxion_core.wire.channel import open_channel
from fluxion_core.wire.plane import HELLO_BYTES, READY, is_proven, machine_id, parse_hello
from fluxion_proto.v1 import generate_pb2, generate_pb2_grpc, handoff_pb2
from services.decode import handoff_stream, kv_connections
from services.decode.data_plane import NICENESS, DataPlane
from services.decode.kv_connections import dial
from services.prefill.service import HandoffService

CONNECTIONS = 2
SOCKETS = HandoffSettings(ways=(Carrier.SOCKETS,), connections=CONNECTIONS, threads=1)
PROMPT_TOKENS = 200


class Beside:
    """A prefill node whose KV comes over connections beside its call, as a test wants it to.

    Args:
        target: host:port of a real one, whose frames it sends.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.calls = 0
        self.change: Callable[[list[bytes]], list[bytes]] = list
        """What becomes of the CHUNK frames."""
        self.ready = READY
        self.cuts: dict[int, int] = {}
        """Connections that end after so many bytes of their frames; others go on."""
        self.stops_after: int | None = None
        """Bytes of each connection after which nothing comes any more."""
        self.counts_wrong = False
        self.trailer_first = False
        self.knows_ways = True
        self.fails_with: tuple[grpc.StatusCode, str] | None = None
        """How the call ends once connections have been cut."""
        self.port = 0
        self.hellos: list[int] = []
        self.have_closed = asyncio.Event()
        self.is_cut = asyncio.Event()
        self._secret = secrets.token_bytes(32)
        self._chunks: list[bytes] = []
        self._open = 0
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> asyncio.Server:
        server = await asyncio.start_server(self._let_in, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def prefill(self, message: bytes, context) -> AsyncIterator[bytes]:
        self.calls += 1
        request = handoff_pb2.HandoffRequest.FromString(message)
        assert list(request.ways) == [handoff_pb2.SOCKETS]
        request.ways[:] = [handoff_pb2.GRPC]
        async with open_channel(self.target, ClientSettings()) as channel:
            method = channel.unary_stream("/fluxion.v1.Handoff/Prefill")
            frames = [f async for f in method(request.SerializeToString())]
        if not self.knows_ways:
            for frame in frames:
                yield frame
            return
        header, *chunks, trailer = frames
        self._chunks = self.change(chunks)
        self.have_closed.clear()
        endpoint = Endpoint(
            Carrier.SOCKETS, bytes(16), self._secret, request.max_connections, port=self.port
        )
        announced = replace(codec.parse_header(codec.decode_frame(header)), endpoint=endpoint)
        yield codec.encode_frame(codec.header_frame(announced))
        if self.counts_wrong:
            told = codec.parse_trailer(codec.decode_frame(trailer))
            told = replace(told, num_chunks=told.num_chunks + 1)
            trailer = codec.encode_frame(codec.trailer_frame(told))
        if self.fails_with is not None:
            await self.is_cut.wait()
            await context.abort(*self.fails_with)
        if not self.trailer_first:
            await self.have_closed.wait()
        yield trailer

    async def _let_in(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        self._writers.append(writer)
        self._tasks.append(asyncio.current_task())
        message = await reader.readexactly(HELLO_BYTES)
        hello = parse_hello(message)
        assert (hello.call_id, is_proven(message, self._secret)) == (bytes(16), True)
        self.hellos.append(hello.connection)
        writer.write(self.ready)
        if self.ready == READY:
            with suppress(ConnectionResetError):
                await self._send(hello.connection, hello.of, reader, writer)
        writer.close()
        self._open -= 1
        if self._open == 0:
            self.have_closed.set()

    async def _send(self, connection, of, reader, writer) -> None:
        mine = [f for f in self._chunks if struct.unpack_from("<I", f, 8)[0] % of == connection]
        stream = b"".join(mine)
        if connection in self.cuts:
            writer.write(stream[: self.cuts[connection]])
            await writer.drain()
            self.is_cut.set()
            return
        writer.write(stream[: self.stops_after])
        # Who has all its frames, or wants no more, ends it.
        assert await reader.read() == b""

    async def end(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def beside(target: str) -> AsyncIterator[tuple[Beside, str]]:
    node = Beside(target)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((HandoffService.generic_handler(node),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    listener = await node.start()
    try:
        yield node, f"127.0.0.1:{port}"
    finally:
        listener.close()
        await node.end()
        await server.stop(0)


def request_of(letter: str) -> generate_pb2.GenerateRequest:
    return generate_pb2.GenerateRequest(
        text=letter * PROMPT_TOKENS, max_new_tokens=8, ignore_eos=True
    )


async def tokens_of(stub: generate_pb2_grpc.GenerationStub, letter: str) -> list[int]:
    return [t async for r in stub.Generate(request_of(letter)) for t in r.token_ids]


async def failure_of(stub: generate_pb2_grpc.GenerationStub, letter: str) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await tokens_of(stub, letter)
    return failure.value


async def assert_nothing_is_held(stub) -> None:
    while (load := await stub.GetLoad(generate_pb2.GetLoadRequest())).running_requests:
        pass
    assert (load.host_kv_reserved_bytes, load.host_kv_used_bytes) == (0, 0)


@asynccontextmanager
async def nodes_of(start_prefill, start_decode, open_stub, **options):
    """A node that sends beside its calls, a client of a decode node that takes its KV from there,
    and one of a node that takes it from the same prefill node by the calls themselves."""
    grpc_only = HandoffSettings(ways=(Carrier.GRPC,))
    async with (
        start_prefill() as prefill,
        beside(prefill.address) as (node, address),
        start_decode(address, **{"handoff": SOCKETS, **options}) as decode,
        start_decode(prefill.address, handoff=grpc_only) as fresh,
        open_stub(decode.address) as stub,
        open_stub(fresh.address) as other,
    ):
        yield node, stub, other


@pytest.mark.parametrize("trailer_first", [False, True])
async def test_tokens_are_the_same_whatever_the_kv_came_over(
    start_prefill, start_decode, open_stub, caplog, trailer_first: bool
):
    caplog.set_level(logging.INFO, logger="services.decode.kv_ingest")
    async with nodes_of(start_prefill, start_decode, open_stub) as (node, stub, other):
        node.trailer_first = trailer_first
        for letter in "xy":
            assert await tokens_of(stub, letter) == await tokens_of(other, letter)
        assert sorted(node.hellos) == [0, 0, 1, 1]
        await assert_nothing_is_held(stub)
        # What this node has stored is as good as what the other one has.
        assert await tokens_of(stub, "x") == await tokens_of(other, "x")
    # K and V, 2 layers, 2 heads of 16 channels in bf16, of 208 tokens: whole blocks.
    assert "way=sockets connections=2 payload_bytes=53248" in caplog.text
    assert "way=grpc connections=0 payload_bytes=53248" in caplog.text


async def test_progress_follows_what_has_landed(start_prefill, start_decode, open_stub):
    async with nodes_of(start_prefill, start_decode, open_stub) as (node, stub, _):
        # By hand: a frame of 64 tokens has 2 heads of 64 x 2 x 16 x 2 B; three of each layer come.
        node.stops_after = 3 * (32 + 8192)
        request = request_of("x")
        request.report_progress = True
        call = stub.Generate(request)
        async for response in call:
            if response.progress.prompt_tokens_done:
                break
        assert response.progress.prompt_tokens_done == 192
        assert response.progress.state == generate_pb2.PROMPT_STATE_PREFILL
        call.cancel()
        await node.have_closed.wait()
        await assert_nothing_is_held(stub)


def recoded(frame: bytes, **changes) -> bytes:
    old = codec.decode_frame(frame)
    fields = {name: getattr(old, name) for name in Frame.__dataclass_fields__}
    return codec.encode_frame(Frame(**{**fields, **changes}))


def with_nan(frame: bytes) -> bytes:
    payload = bytearray(codec.decode_frame(frame).payload)
    payload[:2] = b"\xc0\x7f"
    return recoded(frame, payload=bytes(payload))


def flipped(frame: bytes) -> bytes:
    return frame[:-1] + bytes([frame[-1] ^ 1])


DAMAGE: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "wrong checksum": (lambda f: [*f[:3], flipped(f[3]), *f[4:]], "CRC32C"),
    "gap": (lambda f: [*f[:2], *f[3:]], "gap"),
    "repeated frame": (lambda f: [*f[:3], f[2], *f[3:]], "repeat"),
    "reordered frames": (lambda f: [*f[2:4], *f[:2], *f[4:]], "gap"),
    "wrong magic": (lambda f: [b"X" + f[0][1:], *f[1:]], "begins"),
    "a header": (lambda f: [f[0][:6] + b"\x01" + f[0][7:], *f[1:]], "CHUNK"),
    "a layer of another connection": (lambda f: [recoded(f[0], layer=2), *f[1:]], "layer"),
    "beyond the prompt": (lambda f: [*f[:-2], recoded(f[-2], num_tokens=9)], "tokens"),
    "payload of another size": (lambda f: [recoded(f[0], payload=bytes(64)), *f[1:]], "64 B"),
    "NaN in a key": (lambda f: [with_nan(f[0]), *f[1:]], "NaN or inf"),
    "oversized frame": (
        lambda f: [f[0][:20] + (5 << 20).to_bytes(4, "little") + f[0][24:], *f[1:]],
        "5242880",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_damaged_frames_are_data_loss_and_nothing_of_them_is_left(
    start_prefill, start_decode, open_stub, damage: str
):
    change, words = DAMAGE[damage]
    async with nodes_of(start_prefill, start_decode, open_stub) as (node, stub, other):
        node.change = change
        failure = await failure_of(stub, "y")
        assert failure.code() is grpc.StatusCode.DATA_LOSS, failure.details()
        assert words in failure.details()
        await node.have_closed.wait()
        await assert_nothing_is_held(stub)
        node.change = list
        assert await tokens_of(stub, "y") == await tokens_of(other, "y")
        await assert_nothing_is_held(stub)


async def test_counts_that_differ_from_what_landed_are_data_loss(
    start_prefill, start_decode, open_stub
):
    async with nodes_of(start_prefill, start_decode, open_stub) as (node, stub, _):
        node.counts_wrong = True
        failure = await failure_of(stub, "y")
        assert failure.code() is grpc.StatusCode.DATA_LOSS
        assert "TRAILER counts 9 chunks" in failure.details()
        await assert_nothing_is_held(stub)


@pytest.mark.parametrize("cuts", [{0: 5000, 1: 5000}, {1: 12_000}, {0: 0}])
async def test_connections_that_are_cut_end_the_hand_off_and_leave_nothing(
    start_prefill, start_decode, open_stub, cuts: dict[int, int], monkeypatch
):
    monkeypatch.setattr(handoff_stream, "REASON_SECONDS", 0.05)
    async with nodes_of(start_prefill, start_decode, open_stub) as (node, stub, other):
        node.cuts = cuts
        failure = await failure_of(stub, "y")
        assert failure.code() in (grpc.StatusCode.DATA_LOSS, grpc.StatusCode.UNAVAILABLE)
        await node.have_closed.wait()
        await assert_nothing_is_held(stub)
        node.cuts = {}
        assert await tokens_of(stub, "y") == await tokens_of(other, "y")


async def test_the_call_says_why_connections_were_cut(start_prefill, start_decode, open_stub):
    async with nodes_of(start_prefill, start_decode, open_stub) as (node, stub, _):
        node.cuts = {0: 5000}
        node.fails_with = grpc.StatusCode.RESOURCE_EXHAUSTED, "no memory left over there"
        failure = await failure_of(stub, "y")
        assert failure.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "no memory left over there" in failure.details()
        await assert_nothing_is_held(stub)


async def test_a_node_whose_kv_nobody_takes_names_its_port(start_prefill, start_decode, open_stub):
    async with nodes_of(start_prefill, start_decode, open_stub) as (node, stub, _):
        node.cuts = {0: 5000}
        node.fails_with = grpc.StatusCode.ABORTED, "no KV was taken for 20 s"
        failure = await failure_of(stub, "y")
        assert failure.code() is grpc.StatusCode.UNAVAILABLE
        assert "no KV was taken for 20 s" in failure.details()
        assert f"packets of connections to 127.0.0.1 port {node.port}" in failure.details()
        await assert_nothing_is_held(stub)


async def test_a_hand_off_that_failed_is_tried_on_another_node(
    start_prefill, start_decode, open_stub, monkeypatch
):
    monkeypatch.setattr(handoff_stream, "REASON_SECONDS", 0.05)
    async with (
        start_prefill() as prefill,
        beside(prefill.address) as (bad, bad_address),
        beside(prefill.address) as (good, good_address),
        start_decode(bad_address, good_address, handoff=SOCKETS) as decode,
        open_stub(decode.address) as stub,
    ):
        bad.cuts = {1: 12_000}
        first, second = [await tokens_of(stub, letter) for letter in "yz"]
        # Each of the two was first once.
        assert (bad.calls, good.calls) == (1, 2)
        bad.cuts = {}
        async with start_decode(good_address, handoff=SOCKETS) as fresh:
            async with open_stub(fresh.address) as other:
                assert [await tokens_of(other, letter) for letter in "yz"] == [first, second]
        await assert_nothing_is_held(stub)


async def test_kv_that_does_not_come_though_the_call_is_over_is_given_up(
    start_prefill, start_decode, open_stub
):
    async with nodes_of(start_prefill, start_decode, open_stub, stall_seconds=0.3) as nodes:
        node, stub, other = nodes
        node.stops_after, node.trailer_first = 5000, True
        failure = await failure_of(stub, "y")
        assert failure.code() is grpc.StatusCode.UNAVAILABLE
        assert "the rest of the KV did not come for 0.3 s" in failure.details()
        assert f"packets of connections to 127.0.0.1 port {node.port}" in failure.details()
        assert 'set handoff.ways = ["grpc"]' in failure.details()
        await node.have_closed.wait()
        await assert_nothing_is_held(stub)
        node.stops_after = None
        assert await tokens_of(stub, "y") == await tokens_of(other, "y")


async def test_a_port_that_is_closed_is_named_with_what_helps(
    start_prefill, start_decode, open_stub, free_port
):
    async with nodes_of(start_prefill, start_decode, open_stub) as (node, stub, _):
        node.port = free_port
        failure = await failure_of(stub, "y")
        assert failure.code() is grpc.StatusCode.UNAVAILABLE
        for words in (f"127.0.0.1 port {free_port}", "refused", "open that port", "handoff.ways"):
            assert words in failure.details()
        await assert_nothing_is_held(stub)


async def test_a_node_that_does_not_let_connections_in_is_not_available(
    start_prefill, start_decode, open_stub
):
    async with nodes_of(start_prefill, start_decode, open_stub) as (node, stub, _):
        for answer, words in ((b"", "does not know this hand-off"), (b"HTTP/1.1", "answered")):
            node.ready = answer
            failure = await failure_of(stub, "y")
            assert failure.code() is grpc.StatusCode.UNAVAILABLE
            assert words in failure.details()
        await assert_nothing_is_held(stub)


async def test_a_node_that_sends_with_the_call_in_place_of_beside_it_is_refused(
    start_prefill, start_decode, open_stub
):
    async with nodes_of(start_prefill, start_decode, open_stub) as (node, stub, _):
        node.knows_ways = False
        failure = await failure_of(stub, "y")
        assert failure.code() is grpc.StatusCode.UNAVAILABLE
        assert "it sends KV by grpc, and this node takes it by sockets" in failure.details()
        await assert_nothing_is_held(stub)


GEOMETRY = KvGeometry(num_layers=2, num_kv_heads=2, head_dim=16, slab_tokens=128)


@pytest.fixture
def make_plane():
    """Makes a data plane with its threads, closed at the end."""
    made = []

    def make(*ways: Carrier, client: ClientSettings | None = None) -> DataPlane:
        settings = HandoffSettings(ways=ways, connections=4, threads=1)
        made.append(DataPlane(settings, client or ClientSettings(), GEOMETRY))
        return made[-1]

    yield make
    for plane in made:
        plane.close()
        plane.close()


def endpoint_of(way: Carrier, **fields) -> Endpoint:
    return Endpoint(way, bytes(16), bytes(32), **{"connections": 4, **fields})


def test_a_request_names_ways_machine_and_connections(make_plane, monkeypatch):
    request = handoff_pb2.HandoffRequest()
    make_plane(Carrier.SHARED_MEMORY, Carrier.GRPC).add_ways(request)
    assert list(request.ways) == [handoff_pb2.SHARED_MEMORY, handoff_pb2.GRPC]
    assert (request.machine, request.max_connections) == (machine_id(), 4)
    request = handoff_pb2.HandoffRequest()
    make_plane(Carrier.SOCKETS).add_ways(request)
    assert (list(request.ways), request.machine) == ([handoff_pb2.SOCKETS], "")
    # A machine that cannot be told from others shares no memory.
    monkeypatch.setattr("services.decode.data_plane.machine_id", str)
    request = handoff_pb2.HandoffRequest()
    make_plane(Carrier.SHARED_MEMORY, Carrier.GRPC).add_ways(request)
    assert list(request.ways) == [handoff_pb2.GRPC]


def test_a_way_that_is_not_possible_is_not_named(make_plane, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("services.decode.data_plane._native.tls_missing", lambda: "libssl.so.3 x")
    client = ClientSettings(tls=ClientTlsSettings(authority=tmp_path / "authority.pem"))
    assert make_plane(Carrier.SOCKETS, Carrier.GRPC, client=client).ways == (Carrier.GRPC,)
    assert "KV cannot come this way way=sockets" in caplog.text
    with pytest.raises(ConfigError, match=r"no way is left for KV.*need OpenSSL 3: libssl"):
        make_plane(Carrier.SOCKETS, client=client)
    # Without TLS on the call none is needed.
    assert make_plane(Carrier.SOCKETS).ways == (Carrier.SOCKETS,)


def test_an_answer_is_one_to_what_was_asked(make_plane, tmp_path):
    plain = make_plane(Carrier.SOCKETS)
    plain.check(endpoint_of(Carrier.SOCKETS, port=1))
    for endpoint, words in (
        (None, "by grpc"),
        (endpoint_of(Carrier.SHARED_MEMORY), "by shared_memory"),
        (endpoint_of(Carrier.SOCKETS, connections=5), "asks for 5 connections, and was allowed 4"),
    ):
        with pytest.raises(PeerUnavailableError, match=words):
            plain.check(endpoint)
    # Beside a call over TLS nothing comes unencrypted, but for memory, which leaves no machine.
    client = ClientSettings(tls=ClientTlsSettings(authority=tmp_path / "authority.pem"))
    encrypted = make_plane(Carrier.SOCKETS, Carrier.SHARED_MEMORY, Carrier.GRPC, client=client)
    encrypted.check(None)
    encrypted.check(endpoint_of(Carrier.SHARED_MEMORY))
    encrypted.check(endpoint_of(Carrier.SOCKETS, tls=True))
    with pytest.raises(PeerUnavailableError, match="unencrypted, and is called over TLS"):
        encrypted.check(endpoint_of(Carrier.SOCKETS))


def test_threads_keep_to_the_cpus_that_they_are_given():
    before = set(os.listdir("/proc/self/task"))
    last = max(os.sched_getaffinity(0))
    plane = DataPlane(SOCKETS, ClientSettings(), GEOMETRY, cpus=[last])
    try:
        (thread,) = set(os.listdir("/proc/self/task")) - before
        assert os.sched_getaffinity(int(thread)) == {last}
    finally:
        plane.close()


def test_threads_that_take_kv_in_give_way_to_those_of_a_step():
    before = {thread: niceness_of(thread) for thread in os.listdir("/proc/self/task")}
    settings = HandoffSettings(ways=(Carrier.SOCKETS,), threads=2)
    plane = DataPlane(settings, ClientSettings(), GEOMETRY)
    try:
        after = {thread: niceness_of(thread) for thread in os.listdir("/proc/self/task")}
        own = niceness_of(str(os.getpid()))
        added = [after.pop(thread) for thread in set(after) - set(before)]
        assert added == [min(own + NICENESS, 19)] * 2
        assert after.items() <= before.items()
    finally:
        plane.close()


def niceness_of(thread: str) -> int:
    return os.getpriority(os.PRIO_PROCESS, int(thread))


def test_a_plane_without_ways_beside_the_call_has_no_threads(make_plane):
    names = {thread.name for thread in os.scandir("/proc/self/task")}
    plane = make_plane(Carrier.GRPC)
    assert {thread.name for thread in os.scandir("/proc/self/task")} == names
    assert plane.cpu_seconds() == 0.0


async def test_the_secret_is_proven_and_not_sent():
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        port = listener.getsockname()[1]
        for tls in (False, True):
            endpoint = Endpoint(Carrier.SOCKETS, b"c" * 16, b"s" * 32, 1, port=port, tls=tls)
            dialling = asyncio.ensure_future(dial(endpoint, "127.0.0.1:1", 5))
            accepted, _ = await loop.sock_accept(listener)
            with accepted:
                message = await loop.sock_recv(accepted, HELLO_BYTES)
                await loop.sock_sendall(accepted, READY)
                (await dialling)[0].close()
            assert parse_hello(message).call_id == b"c" * 16
            assert is_proven(message, b"s" * 32)
            assert b"s" * 32 not in message


async def test_who_does_not_say_ready_in_time_is_given_up(monkeypatch):
    monkeypatch.setattr(kv_connections, "HELLO_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = endpoint_of(Carrier.SOCKETS, port=listener.getsockname()[1])
        with pytest.raises(PeerUnavailableError, match=r"HELLO was not answered for 0\.05 s"):
            await dial(endpoint, "127.0.0.1:1", 5)
        # Nothing of it is left.
        for _ in range(endpoint.connections):
            connection, _ = listener.accept()
            with connection:
                connection.recv(HELLO_BYTES, socket.MSG_WAITALL)
                assert connection.recv(1) == b""


async def test_dialling_that_is_cancelled_leaves_nothing(monkeypatch):
    is_ready = asyncio.Event()
    monkeypatch.setattr(kv_connections, "check_ready", lambda _: is_ready.set())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        endpoint = endpoint_of(Carrier.SOCKETS, port=listener.getsockname()[1])
        dialling = asyncio.ensure_future(dial(endpoint, "127.0.0.1:1", 5))
        loop = asyncio.get_running_loop()
        accepted = [(await loop.sock_accept(listener))[0] for _ in range(endpoint.connections)]
        # One of them is ready by then.
        await loop.sock_sendall(accepted[0], READY)
        await is_ready.wait()
        dialling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dialling
        for connection in accepted:
            with connection:
                assert len(await loop.sock_recv(connection, HELLO_BYTES)) == HELLO_BYTES
                assert await loop.sock_recv(connection, 1) == b""


async def test_who_does_not_answer_is_given_up():
    # A full backlog: what comes now is neither let in nor refused.
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for one in (first, second):
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        endpoint = endpoint_of(Carrier.SOCKETS, connections=1, port=listener.getsockname()[1])
        with pytest.raises(PeerUnavailableError, match=r"nobody answered for 0\.1 s"):
            await dial(endpoint, "127.0.0.1:1", 0.1)


async def test_shared_memory_is_taken_from_the_same_user_only(monkeypatch):
    name = f"fluxion-test-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX) as listener:
        endpoint = endpoint_of(Carrier.SHARED_MEMORY, connections=1, unix_name=name)
        with pytest.raises(PeerUnavailableError, match=rf"@{name} \(Connection refused\)"):
            await dial(endpoint, "127.0.0.1:1", 5)
        listener.bind(f"\0{name}")
        listener.listen()
        monkeypatch.setattr(os, "getuid", lambda: 123_456)
        with pytest.raises(PeerUnavailableError, match="this node is user 123456"):
            await dial(endpoint, "127.0.0.1:1", 5)


async def test_a_full_backlog_of_a_unix_socket_is_waited_for():
    name = f"fluxion-test-{secrets.token_hex(8)}"
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(f"\0{name}")
        listener.listen(0)
        first.connect(f"\0{name}")
        endpoint = endpoint_of(Carrier.SHARED_MEMORY, connections=1, unix_name=name)
        dialling = asyncio.ensure_future(dial(endpoint, "127.0.0.1:1", 5))
        await asyncio.sleep(0)
        listener.setblocking(False)
        (await loop.sock_accept(listener))[0].close()
        accepted, _ = await loop.sock_accept(listener)
        with accepted:
            await loop.sock_sendall(accepted, READY)
            (connection,) = await dialling
            connection.close()
