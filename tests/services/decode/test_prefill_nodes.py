"""Names of prefill nodes, resolved to all their replicas and used in turn."""

from __future__ import annotations

import asyncio
import socket

import grpc
import pytest

from fluxion_core.config.settings import ClientSettings, ClientTlsSettings
from fluxion_proto.v1 import handoff_pb2, handoff_pb2_grpc
from services.decode.prefill_nodes import NodeLoad, PrefillNodes
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
    """A prefill node that only says how busy it is: with a long prompt, and short ones."""

    def __init__(
        self,
        shorts: int,
        *,
        long: int = 100_000,
        is_draining: bool = False,
        is_old: bool = False,
    ) -> None:
        self._shorts, self._long = shorts, long
        self._is_draining, self._is_old = is_draining, is_old

    async def GetPrefillLoad(self, request, context):
        del context
        pending = self._shorts + self._long
        answer = handoff_pb2.GetPrefillLoadResponse(
            pending_tokens=pending, is_draining=self._is_draining
        )
        if not self._is_old:
            before = self._shorts if request.prompt_tokens < 100_000 else pending
            answer.tokens_before, answer.seconds_before = before, before / 1000
        return answer


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
        assert await nodes.by_load(1000) == [idle, busy, silent]


async def test_of_nodes_where_a_prompt_would_be_next_the_idle_one_is_first(start_node, open_nodes):
    long, idle = await start_node(Node(0)), await start_node(Node(0, long=0))
    nodes = open_nodes(long, idle)
    for _ in range(2):
        assert await nodes.by_load(1000) == [idle, long]


async def test_the_least_busy_node_says_what_a_prompt_would_wait_for(
    start_node, open_nodes, find_free_address
):
    busy, idle = await start_node(Node(9000)), await start_node(Node(70))
    going = await start_node(Node(0, is_draining=True))
    nodes = open_nodes(busy, idle, going, find_free_address())
    # Nobody has been called yet, so that nobody is known.
    assert await nodes.least_load(1000) == NodeLoad()
    first = await nodes.in_turn()
    assert await nodes.least_load(1000) == NodeLoad(70, 100_070, seconds_before=0.07)
    assert await nodes.least_load(200_000) == NodeLoad(100_070, 100_070, seconds_before=100.07)
    # Whose turn it is does not change.
    assert await nodes.in_turn() == first[1:] + first[:1]


async def test_what_was_just_sent_counts_before_the_node_says_so(start_node, open_nodes):
    first, second = await start_node(Node(0)), await start_node(Node(0))
    nodes = open_nodes(first, second)
    with nodes.sending(first, 700) as first_said:
        assert {(await nodes.by_load(700))[0] for _ in range(3)} == {second}
        with nodes.sending(second, 900):
            assert (await nodes.by_load(900))[0] == first
            # One that is shorter goes before both: they count as work alone.
            assert (await nodes.by_load(600))[0] == first
            expected = NodeLoad(700, 100_700, seconds_before=0.0, other_tokens=700)
            assert await nodes.least_load(900) == expected
            first_said()
            assert await nodes.least_load(900) == NodeLoad(0, 100_000)
    # Equally busy: in turn.
    assert {(await nodes.by_load(1000))[0] for _ in range(2)} == {first, second}


async def test_of_a_node_that_makes_no_estimate_all_counts_as_before(start_node, open_nodes):
    nodes = open_nodes(await start_node(Node(70, is_old=True)))
    await nodes.in_turn()
    assert await nodes.least_load(1000) == NodeLoad(100_070, 100_070, other_tokens=100_070)


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
