"""Names of prefill nodes, resolved to all their replicas and used in turn."""

from __future__ import annotations

import asyncio
import socket

import grpc
import pytest

from fluxion_core.config.settings import ClientSettings, ClientTlsSettings
from fluxion_proto.v1 import handoff_pb2, handoff_pb2_grpc
from services.decode.prefill_nodes import PrefillNodes
from tests.certificates import Authority


class Names:
    """A resolver in place of the system's: what each name stands for now."""

    def __init__(self) -> None:
        self.records: dict[str, list[str]] = {}
        self.failure = socket.EAI_NONAME

    async def getaddrinfo(self, host, port, **_):
        if not self.records.get(host):
            raise socket.gaierror(self.failure, "no answer with an address")
        return [
            (
                socket.AF_INET6 if ":" in address else socket.AF_INET,
                socket.SOCK_STREAM,
                6,
                "",
                (address, int(port)),
            )
            for address in self.records[host]
        ]


@pytest.fixture
async def names(monkeypatch) -> Names:
    found = Names()
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", found.getaddrinfo, raising=False)
    return found


@pytest.fixture
async def open_nodes(monkeypatch):
    opened = []

    def open_(*addresses: str) -> PrefillNodes:
        opened.append(PrefillNodes(addresses, ClientSettings()))
        return opened[-1]

    yield open_
    for nodes in opened:
        await nodes.close()


async def test_a_name_with_two_addresses_is_two_nodes_each_first_in_turn(names, open_nodes):
    names.records["prefill"] = ["10.0.0.2", "10.0.0.1"]
    nodes = open_nodes("prefill:7070")
    both = ["10.0.0.1:7070", "10.0.0.2:7070"]
    assert [await nodes.in_turn() for _ in range(3)] == [both[::-1], both, both[::-1]]


async def test_replicas_that_come_and_go_are_noticed_at_the_next_prompt(names, open_nodes):
    names.records["prefill"] = ["10.0.0.1"]
    nodes = open_nodes("prefill:7070")
    assert await nodes.in_turn() == ["10.0.0.1:7070"]
    names.records["prefill"] = ["10.0.0.1", "10.0.0.2"]
    assert sorted(await nodes.in_turn()) == ["10.0.0.1:7070", "10.0.0.2:7070"]
    names.records["prefill"] = ["10.0.0.2"]
    assert await nodes.in_turn() == ["10.0.0.2:7070"]


async def test_a_channel_in_use_outlives_its_name(names, open_nodes):
    names.records["prefill"] = ["10.0.0.1"]
    nodes = open_nodes("prefill:7070")
    (node,) = await nodes.in_turn()
    async with nodes.channel(node) as channel:
        names.records["prefill"] = ["10.0.0.2"]
        await nodes.in_turn()
        async with nodes.channel(node) as again:
            assert again is channel
    await nodes.in_turn()
    async with nodes.channel(node) as later:
        assert later is not channel


class Node(handoff_pb2_grpc.PrefillNodeServicer):
    """A prefill node that only says how busy it is."""

    def __init__(self, pending_tokens: int, *, is_draining: bool = False) -> None:
        self._answer = handoff_pb2.GetPrefillLoadResponse(
            pending_tokens=pending_tokens, is_draining=is_draining
        )

    async def GetPrefillLoad(self, request, context):
        del request, context
        return self._answer


@pytest.fixture
async def start_node():
    servers = []

    async def start(node: Node) -> str:
        server = grpc.aio.server()
        handoff_pb2_grpc.add_PrefillNodeServicer_to_server(node, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        await server.stop(0)


async def test_the_least_busy_node_is_first_and_draining_ones_are_left_alone(
    start_node, open_nodes, find_free_address
):
    busy, idle = await start_node(Node(9000)), await start_node(Node(10))
    going = await start_node(Node(0, is_draining=True))
    silent = find_free_address()
    nodes = open_nodes(silent, busy, going, idle)
    for _ in range(4):
        assert await nodes.by_load() == [idle, busy, silent]


async def test_the_least_busy_node_says_what_a_prompt_would_wait_for(
    start_node, open_nodes, find_free_address
):
    busy, idle = await start_node(Node(9000)), await start_node(Node(70))
    going = await start_node(Node(0, is_draining=True))
    nodes = open_nodes(busy, idle, going, find_free_address())
    # Nobody has been called yet, so that nobody is known.
    assert await nodes.least_pending_tokens() == 0
    first = await nodes.in_turn()
    assert await nodes.least_pending_tokens() == 70
    # Whose turn it is does not change.
    assert await nodes.in_turn() == first[1:] + first[:1]


async def test_what_was_just_sent_counts_before_the_node_says_so(start_node, open_nodes):
    first, second = await start_node(Node(0)), await start_node(Node(0))
    nodes = open_nodes(first, second)
    async with nodes.channel(first, 700):
        assert {(await nodes.by_load())[0] for _ in range(3)} == {second}
        async with nodes.channel(second, 900):
            assert (await nodes.by_load())[0] == first
    # Equally busy: in turn.
    assert {(await nodes.by_load())[0] for _ in range(2)} == {first, second}


async def test_an_address_stands_for_itself_and_is_not_looked_up(names, open_nodes):
    assert await open_nodes("127.0.0.1:1").in_turn() == ["127.0.0.1:1"]
    assert await open_nodes("[::1]:2").in_turn() == ["[::1]:2"]


async def test_a_node_with_both_families_is_one_node(names, open_nodes):
    names.records["dual"] = ["fd00::1", "10.0.0.1"]
    names.records["six"] = ["fd00::2"]
    assert await open_nodes("dual:7070").in_turn() == ["10.0.0.1:7070"]
    assert await open_nodes("six:7070").in_turn() == ["[fd00::2]:7070"]


async def test_a_name_that_does_not_resolve_gives_no_node(names, open_nodes, caplog):
    names.records["prefill"] = ["10.0.0.1"]
    nodes = open_nodes("nowhere:7070", "prefill:7070")
    assert len(nodes) == 2
    assert await nodes.in_turn() == ["10.0.0.1:7070"]
    assert "prefill node not found host=nowhere" in caplog.text
    assert await open_nodes("nowhere:7070").in_turn() == []


async def test_a_failed_look_up_leaves_the_nodes_that_the_name_gave_last(names, open_nodes, caplog):
    names.records["prefill"] = ["10.0.0.1", "10.0.0.2"]
    nodes = open_nodes("prefill:7070")
    both = set(await nodes.in_turn())
    (node, _) = both
    async with nodes.channel(node) as channel:
        pass
    del names.records["prefill"]
    names.failure = socket.EAI_AGAIN
    assert set(await nodes.in_turn()) == both
    assert "prefill node not found host=prefill" in caplog.text
    assert "last_known=10.0.0.1:7070,10.0.0.2:7070" in caplog.text
    async with nodes.channel(node) as same:
        assert same is channel
    names.records["prefill"] = ["10.0.0.3"]
    assert await nodes.in_turn() == ["10.0.0.3:7070"]


async def test_of_a_name_that_is_no_more_the_connected_nodes_stay(names, open_nodes, start_node):
    port = int((await start_node(Node(0))).rpartition(":")[2])
    names.records["prefill"] = ["127.0.0.1", "127.0.0.2"]
    nodes = open_nodes(f"prefill:{port}")
    connected = f"127.0.0.1:{port}"
    assert len(await nodes.in_turn()) == 2
    assert await nodes.answers(connected, seconds=60)
    del names.records["prefill"]
    assert await nodes.in_turn() == [connected]


async def test_a_resolver_that_does_not_answer_has_failed(monkeypatch, caplog):
    async def forever(*_, **__):
        await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", forever, raising=False)
    nodes = PrefillNodes(["prefill:7070"], ClientSettings(connect_seconds=0.01))
    assert await nodes.in_turn() == []
    assert 'error="no answer within 0.01 s"' in caplog.text
    await nodes.close()


async def test_a_renewed_certificate_is_shown_without_a_restart(tmp_path):
    authority = Authority(tmp_path)
    certificate, key = authority.issue("decode")
    tls = ClientTlsSettings(authority=authority.path, certificate=certificate, key=key)
    nodes = PrefillNodes(["127.0.0.1:7070"], ClientSettings(tls=tls))
    try:
        (node,) = await nodes.in_turn()
        async with nodes.channel(node) as before:
            await nodes.in_turn()
            async with nodes.channel(node) as same:
                assert same is before
            authority.issue("decode")
            await nodes.in_turn()
            # A hand-off runs over it.
            async with nodes.channel(node) as same:
                assert same is before
        await nodes.in_turn()
        async with nodes.channel(node) as renewed:
            assert renewed is not before
        certificate.write_text("half a file")
        await nodes.in_turn()
        async with nodes.channel(node) as same:
            assert same is renewed
    finally:
        await nodes.close()


class SilentNode(Node):
    """A prefill node that lets who asks wait."""

    async def GetPrefillLoad(self, request, context):
        await asyncio.get_running_loop().create_future()


async def test_a_connection_over_which_no_answer_came_is_not_used_again(start_node, open_nodes):
    silent, other = await start_node(SilentNode(0)), await start_node(Node(0))
    nodes = open_nodes(silent, other)
    channels = {}
    for node in (silent, other):
        async with nodes.channel(node) as channel:
            channels[node] = channel
    assert not await nodes.answers(silent, seconds=0.05)
    assert await nodes.answers(other, seconds=60)
    async with nodes.channel(silent) as channel:
        await nodes.in_turn()
        # Who still uses it may go on.
        async with nodes.channel(silent) as same:
            assert same is channel
    await nodes.in_turn()
    async with nodes.channel(silent) as channel:
        assert channel is not channels[silent]
    async with nodes.channel(other) as channel:
        assert channel is channels[other]
