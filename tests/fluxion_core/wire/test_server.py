"""A node's server over real gRPC: who gets through, what others are told, what is bounded."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import ssl
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fluxion_core.config.settings import (
    AuthSettings,
    ClientLimitSettings,
    ClientSettings,
    ClientTlsSettings,
    ServerSettings,
    ServerTlsSettings,
)
from fluxion_core.errors import (
    CapacityError,
    ConfigError,
    InvalidRequestError,
    PeerUnavailableError,
)
from fluxion_core.wire.channel import open_channel
from fluxion_core.wire.server import NodeServer
from fluxion_proto.v1 import generate_pb2, generate_pb2_grpc
from tests.certificates import Authority, write_secret

SERVICE = "fluxion.v1.Generation"
ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"


class Held:
    """What a service has in its hands as it fails."""


class Service(generate_pb2_grpc.GenerationServicer):
    """Answers Generate with who asks, and then as the prompt says."""

    def __init__(self, server: NodeServer) -> None:
        self.server = server
        self.calls = 0
        self.may_end = asyncio.Event()
        self.has_ended = asyncio.Event()

    async def Generate(self, request, context) -> AsyncIterator[generate_pb2.GenerateResponse]:
        self.calls += 1
        yield generate_pb2.GenerateResponse(text=self.server.callers.client_of(context))
        match request.text:
            case "hold":
                held = Held()
                self.held = weakref.ref(held)
                raise InvalidRequestError("no")
            case "wait":
                await self.may_end.wait()
            case "flood":
                try:
                    while True:
                        yield generate_pb2.GenerateResponse(text="x" * (1 << 20))
                finally:
                    self.has_ended.set()
            case "full":
                raise CapacityError(
                    "queue", needed=1, free=0, unit="places", remedy="x", retry_after_seconds=1.5
                )
            case "plain" | "ü%":
                raise PeerUnavailableError(request.text * 10_000)
            case "bug":
                raise KeyError("what nobody may see")
            case "threads":
                raise RuntimeError("can't start new thread")

    async def Tokenize(self, request, context) -> generate_pb2.TokenizeResponse:
        self.calls += 1
        count = 1 << 20 if request.text == "flood" else 1
        return generate_pb2.TokenizeResponse(token_ids=[len(request.text)] * count)


@asynccontextmanager
async def serving(**settings) -> AsyncIterator[tuple[str, Service]]:
    server = NodeServer(ServerSettings(**settings), SERVICE, reflected=[SERVICE])
    service = Service(server)
    try:
        address = await server.start()
        generate_pb2_grpc.add_GenerationServicer_to_server(service, server)
        await server.set_ready(is_ready=True)
        yield address, service
    finally:
        await server.stop(0)


@asynccontextmanager
async def calling(address: str, **client) -> AsyncIterator[generate_pb2_grpc.GenerationStub]:
    async with open_channel(address, ClientSettings(**client)) as channel:
        yield generate_pb2_grpc.GenerationStub(channel)


async def said(stub: generate_pb2_grpc.GenerationStub, text: str = "", **call) -> str:
    request = generate_pb2.GenerateRequest(text=text)
    return "".join([response.text async for response in stub.Generate(request, **call)])


async def refusal(stub: generate_pb2_grpc.GenerationStub, text: str = "", **call):
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await said(stub, text, **{"timeout": 30, **call})
    return failure.value


async def health_of(channel: grpc.aio.Channel, service: str = SERVICE) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service)
    return (await stub.Check(request, timeout=30)).status


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def tokens(tmp_path: Path) -> AuthSettings:
    content = f"alice {ALICE}\nbob {BOB}\n"
    return AuthSettings(token_file=write_secret(tmp_path / "tokens", content))


async def test_only_known_tokens_get_through_and_their_names_are_known(tokens, tmp_path, caplog):
    mine = write_secret(tmp_path / "mine", ALICE)
    wrong = write_secret(tmp_path / "wrong", "nobody-0123456789abcdef")
    with caplog.at_level(logging.DEBUG):
        async with serving(auth=tokens) as (address, service):
            async with calling(address, token_file=mine) as stub:
                assert await said(stub) == "alice"
                length = await stub.Tokenize(generate_pb2.TokenizeRequest(text="four"))
                assert list(length.token_ids) == [4]
            calls = service.calls
            async with calling(address) as stub:
                assert (await refusal(stub)).code() == grpc.StatusCode.UNAUTHENTICATED
                twice = [("authorization", f"Bearer {ALICE}"), ("authorization", f"Bearer {BOB}")]
                assert "wrong bearer token" in (await refusal(stub, metadata=twice)).details()
            async with calling(address, token_file=wrong) as stub:
                failure = await refusal(stub)
                assert failure.code() == grpc.StatusCode.UNAUTHENTICATED
                assert "nobody" not in failure.details()
            assert service.calls == calls
    assert "caller refused" in caplog.text
    for secret in (ALICE, BOB, "nobody-0123456789abcdef"):
        assert secret not in caplog.text


async def test_a_token_that_is_taken_back_is_refused_at_the_next_call(tokens, tmp_path):
    async with serving(auth=tokens) as (address, _):
        mine = write_secret(tmp_path / "mine", ALICE)
        async with calling(address, token_file=mine) as stub:
            assert await said(stub) == "alice"
            write_secret(tokens.token_file, f"bob {BOB}\n")
            assert (await refusal(stub)).code() == grpc.StatusCode.UNAUTHENTICATED
            # The client's file is read again too.
            write_secret(mine, BOB)
            assert await said(stub) == "bob"


async def test_health_is_for_everybody_and_reflection_is_not(tokens):
    async with serving(auth=tokens) as (address, _), grpc.aio.insecure_channel(address) as channel:
        assert await health_of(channel) == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            [_ async for _ in stub.ServerReflectionInfo(iter([request]))]
        assert failure.value.code() == grpc.StatusCode.UNAUTHENTICATED
        metadata = [("authorization", f"Bearer {ALICE}")]
        answers = [
            answer.list_services_response
            async for answer in stub.ServerReflectionInfo(iter([request]), metadata=metadata)
        ]
        assert SERVICE in [service.name for service in answers[0].service]


async def test_a_refused_callers_message_is_not_read(tokens):
    # Who reads a message above its limit says RESOURCE_EXHAUSTED.
    async with serving(auth=tokens, max_request_bytes=1 << 20) as (address, service):
        async with calling(address) as stub:
            failure = await refusal(stub, "x" * (3 << 20))
            assert failure.code() == grpc.StatusCode.UNAUTHENTICATED
            assert service.calls == 0


async def test_messages_and_metadata_are_bounded():
    async with serving(max_request_bytes=1000, max_metadata_bytes=2000) as (address, service):
        async with calling(address) as stub:
            assert (await refusal(stub, "x" * 2000)).code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            large = [("x-large", "y" * 3000)]
            failure = await refusal(stub, metadata=large)
            assert failure.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert service.calls == 0
            assert await said(stub) == "127.0.0.1"


async def test_a_message_that_is_none_is_the_clients_fault():
    async with serving() as (address, service):
        async with grpc.aio.insecure_channel(address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await channel.unary_unary(f"/{SERVICE}/Tokenize")(b"\xff\xff")
            assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await channel.unary_stream(f"/{SERVICE}/Generate")(b"\xff\xff").read()
            assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            nothing = channel.stream_unary(f"/{SERVICE}/Tokenize")
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await nothing(iter([]))
            assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await channel.unary_unary(f"/{SERVICE}/Nothing")(b"")
            assert failure.value.code() == grpc.StatusCode.UNIMPLEMENTED
        assert service.calls == 0


async def test_a_client_is_limited_and_told_how_long_to_wait(tokens, tmp_path):
    limits = ClientLimitSettings(requests_in_flight=1, requests_per_minute=3)
    alice = write_secret(tmp_path / "alice", ALICE)
    bob = write_secret(tmp_path / "bob", BOB)
    async with serving(auth=tokens, client_limits=limits) as (address, service):
        async with (
            calling(address, token_file=alice) as first,
            calling(address, token_file=bob) as other,
        ):
            running = first.Generate(generate_pb2.GenerateRequest(text="wait"))
            assert (await running.read()).text == "alice"
            failure = await refusal(first)
            assert failure.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "client alice in flight: need 1 calls, 0 calls free" in failure.details()
            assert await said(other) == "bob"
            running.cancel()
            service.may_end.set()
            while "in flight" in (failure := await outcome(first)):
                pass
            assert failure == "alice"
            assert await said(first) == "alice"
            failure = await refusal(first)
            assert failure.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "3 may begin in 60 s; retry in" in failure.details()
            milliseconds = dict(failure.trailing_metadata())["grpc-retry-pushback-ms"]
            assert 0 < int(milliseconds) <= 60_000


async def outcome(stub: generate_pb2_grpc.GenerationStub) -> str:
    """What is said, or why not."""
    try:
        return await said(stub)
    except grpc.aio.AioRpcError as error:
        return str(error.details())


async def test_who_does_not_take_an_answer_has_its_call_ended(caplog):
    no_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 8192)]
    async with (
        serving(unread_seconds=0.3) as (address, service),
        grpc.aio.insecure_channel(address, options=no_window) as channel,
        calling(address) as other,
    ):
        stub = generate_pb2_grpc.GenerationStub(channel)
        streaming = aiter(stub.Generate(generate_pb2.GenerateRequest(text="flood")))
        await anext(streaming)
        await service.has_ended.wait()
        assert service.server.unread_calls == 1
        assert "answer not taken method=/fluxion.v1.Generation/Generate" in caplog.text
        # Nothing else of the client, or of others, has ended.
        assert await said(stub) == await said(other) == "127.0.0.1"
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            async for _ in streaming:
                pass
        # Who comes back is told what became of the rest.
        assert failure.value.code() == grpc.StatusCode.ABORTED
        assert "server.unread_seconds" in failure.value.details()
        # An answer of one message is no exception.
        request = generate_pb2.TokenizeRequest(text="flood")
        unread = channel.unary_stream(
            f"/{SERVICE}/Tokenize", generate_pb2.TokenizeRequest.SerializeToString
        )(request)
        while service.server.unread_calls < 2:
            await asyncio.sleep(0)
        unread.cancel()
    # That nobody is there any more to be told is no failure of the node's.
    assert "call failed" not in caplog.text


async def test_a_message_that_does_not_come_ends_the_call():
    async with (
        serving(request_seconds=0.2) as (address, service),
        grpc.aio.insecure_channel(address) as channel,
    ):
        begun = channel.stream_unary(f"/{SERVICE}/Tokenize")
        reflecting = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        for call in (begun(), reflecting):
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await (call.read() if call is reflecting else call)
            assert failure.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            assert "server.request_seconds" in failure.value.details()
        assert service.calls == 0


async def test_errors_of_services_are_statuses_and_bugs_are_request_ids():
    async with serving() as (address, _), calling(address) as stub:
        full = await refusal(stub, "full")
        assert full.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(full.trailing_metadata())["grpc-retry-pushback-ms"] == "1500"
        bug = await refusal(stub, "bug")
        assert bug.code() == grpc.StatusCode.INTERNAL
        assert bug.details().startswith("internal error; request id ")
        threads = await refusal(stub, "threads")
        assert threads.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "no further thread can be started" in threads.details()
        # A client can tell each of them from a connection that broke.
        kinds = [dict(one.trailing_metadata())["fluxion-error"] for one in (bug, threads)]
        assert kinds == ["InternalError", "ThreadLimitError"]
        assert "nobody" not in bug.details()


async def test_an_address_that_is_taken_is_told_in_the_systems_words():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError) as failure:
            await NodeServer(ServerSettings(listen=address), SERVICE).start()
    assert str(failure.value) == f"server.listen {address}: Address already in use"


async def test_a_failed_call_keeps_nothing_of_what_it_held():
    gc.disable()
    try:
        async with serving() as (address, service), calling(address) as stub:
            assert (await refusal(stub, "hold")).code() == grpc.StatusCode.INVALID_ARGUMENT
            assert service.held() is None
    finally:
        gc.enable()


async def test_a_large_message_is_the_only_one_of_its_call():
    message = generate_pb2.TokenizeRequest(text="x" * (1 << 20)).SerializeToString()
    async with serving() as (address, service), grpc.aio.insecure_channel(address) as channel:
        call = channel.stream_unary(f"/{SERVICE}/Tokenize")
        assert await call(iter([message]))
        with pytest.raises(grpc.aio.AioRpcError, match="a second message"):
            await call(iter([message, message]))
        assert service.calls == 1


async def test_before_it_is_ready_a_node_answers_health_alone():
    server = NodeServer(ServerSettings(), SERVICE)
    address = await server.start()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            assert await health_of(channel, "") == health_pb2.HealthCheckResponse.SERVING
            assert await health_of(channel) == health_pb2.HealthCheckResponse.NOT_SERVING
        async with calling(address) as stub:
            failure = await refusal(stub)
            assert failure.code() == grpc.StatusCode.UNAVAILABLE
            assert "starting or draining" in failure.details()
    finally:
        await server.stop(0)


class Pki:
    """A node's certificate and clients' of the same and of another authority."""

    def __init__(self, directory: Path) -> None:
        self.authority = Authority(directory)
        (directory / "other").mkdir()
        self.other = Authority(directory / "other", "other")
        self.node = self.authority.issue("node")

    def server(self, *, is_mutual: bool = True) -> ServerTlsSettings:
        certificate, key = self.node
        authority = self.authority.path if is_mutual else None
        return ServerTlsSettings(certificate=certificate, key=key, client_authority=authority)

    def client(self, name: str = "", issuer: Authority | None = None, **more) -> ClientTlsSettings:
        pair = (issuer or self.authority).issue(name, **more) if name else (None, None)
        return ClientTlsSettings(authority=self.authority.path, certificate=pair[0], key=pair[1])


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


async def test_mutual_tls_lets_in_whom_the_authority_signed(pki: Pki):
    health_address = free_address()
    async with serving(tls=pki.server(), health_listen=health_address) as (address, service):
        async with calling(address, tls=pki.client("decode-1")) as stub:
            assert await said(stub) == "decode-1"
        refused = {
            "no certificate": pki.client(),
            "another authority's": pki.client("decode-2", pki.other),
            "expired": pki.client("decode-3", valid_for=timedelta(minutes=-1)),
        }
        # Checked at start by the client itself; here what the server does about it.
        for tls in refused.values():
            async with calling(address, tls=tls) as stub:
                assert (await refusal(stub)).code() == grpc.StatusCode.UNAVAILABLE
        async with calling(address) as stub:
            assert (await refusal(stub)).code() == grpc.StatusCode.UNAVAILABLE
        assert service.calls == 1
        async with grpc.aio.insecure_channel(health_address) as channel:
            assert await health_of(channel) == health_pb2.HealthCheckResponse.SERVING
        async with calling(health_address) as stub:
            assert (await refusal(stub)).code() == grpc.StatusCode.UNIMPLEMENTED


async def test_certificates_may_have_to_bear_a_name(pki: Pki):
    auth = AuthSettings(certificate_names=("decode-1", "decode-2"))
    async with serving(tls=pki.server(), auth=auth) as (address, service):
        async with calling(address, tls=pki.client("decode-2")) as stub:
            assert await said(stub) == "decode-2"
        async with calling(address, tls=pki.client("web")) as stub:
            failure = await refusal(stub)
            assert failure.code() == grpc.StatusCode.UNAUTHENTICATED
            assert "certificate_names" in failure.details()
        assert service.calls == 1


async def test_a_client_does_not_talk_to_a_node_of_another_authority(pki: Pki):
    certificate, key = pki.other.issue("node")
    tls = ServerTlsSettings(certificate=certificate, key=key)
    async with serving(tls=tls) as (address, service):
        async with calling(address, tls=pki.client()) as stub:
            failure = await refusal(stub)
            assert failure.code() == grpc.StatusCode.UNAVAILABLE
            assert "CERTIFICATE_VERIFY_FAILED" in failure.details()
        assert service.calls == 0


async def test_a_renewed_certificate_is_used_without_a_restart(pki: Pki, tmp_path: Path):
    async with serving(tls=pki.server(is_mutual=False)) as (address, _):
        host, _, port = address.rpartition(":")

        async def serial() -> str:
            reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
            found = writer.get_extra_info("ssl_object").getpeercert()["serialNumber"]
            writer.transport.abort()
            del reader
            return str(found)

        context = ssl.create_default_context(cafile=str(pki.authority.path))
        before = await serial()
        assert await serial() == before
        pki.authority.issue("node")
        assert await serial() != before


async def test_connections_beyond_the_bound_are_closed():
    async with serving(max_connections=2) as (address, _):
        async with calling(address) as first:
            assert await said(first) == "127.0.0.1"
            host, _, port = address.rpartition(":")
            held = [await asyncio.open_connection(host, int(port)) for _ in range(4)]
            # The server speaks first on a connection that it takes, and closes the others.
            firsts = [await asyncio.wait_for(reader.read(1), 30) for reader, _ in held]
            assert firsts.count(b"") >= 2
            for _, writer in held:
                writer.close()
            assert await said(first) == "127.0.0.1"


@pytest.mark.parametrize("text", ["plain", "ü%"])
async def test_a_text_too_long_for_metadata_is_cut_and_its_status_stays(text: str):
    async with serving() as (address, _), calling(address) as stub:
        failure = await refusal(stub, text)
    assert failure.code() is grpc.StatusCode.UNAVAILABLE
    assert failure.details().startswith(text * 600)
    assert failure.details().endswith(" ... (cut)")
