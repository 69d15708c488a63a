"""The prefill nodes that a decode node calls: names resolved to all replicas, least busy first.

A host name stands for every address that it resolves to (a Compose service with replicas, a
headless Kubernetes service); it is looked up again for each prompt, so that replicas that come are
used at once and those that go are not asked. Each replica has a channel of its own: which one
failed, and that the next attempt goes to another, is then ours to say.

Where there are several, each is asked before a prompt is handed to one what it would wait for
there: an answer takes a millisecond, a prompt seconds.

Not here: what names stand for (node_names.py); what is asked of nodes (kv_ingest.py). On the event
loop only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import grpc

from fluxion_core.config.addresses import Address
from fluxion_core.config.settings import ClientSettings
from fluxion_core.observe.log import event
from fluxion_core.wire.channel import open_channel
from fluxion_core.wire.status import error_from_rpc
from fluxion_core.wire.tls import watched_channel_credentials
from fluxion_proto.v1 import handoff_pb2, handoff_pb2_grpc
from services.decode.node_names import NodeNames

_log = logging.getLogger(__name__)

LOAD_SECONDS = 0.5
"""For a node to say how busy it is."""

_TAKES_NOTHING = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
    }
)
"""What a node that cannot be given prompts answers; any other refusal is of this one question."""


@dataclass(frozen=True)
class NodeLoad:
    """Work that a prefill node has when a prompt may come."""

    tokens_before: int = 0
    """That it computes before such a prompt."""
    pending_tokens: int = 0
    """All that it has to compute."""
    seconds_before: float = 0.0
    """Its own estimate, for `tokens_before` less `other_tokens`."""
    other_tokens: int = 0
    """Those that were just sent to it; all of a node that makes no estimate."""
    is_draining: bool = False


class PrefillNodes:
    """Channels to prefill nodes.

    Args:
        addresses: host:port of each, or of each set of replicas.
        client: how they are called.
    """

    def __init__(self, addresses: Sequence[str], client: ClientSettings) -> None:
        self._addresses = [Address.parse(address) for address in addresses]
        self._names = NodeNames(client.connect_seconds)
        self._client = client
        self._credentials = watched_channel_credentials(client.tls, "prefill.client.tls")
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._opened_with: dict[str, grpc.ChannelCredentials | None] = {}
        self._silent: set[str] = set()
        """Nodes whose connection carries nothing, though it is not broken."""
        self._calls: dict[str, int] = {}
        self._sent: dict[str, list[int]] = {}
        """Tokens of each prompt that a node was sent and has not said a word of."""
        self._next = 0

    def __len__(self) -> int:
        """How many addresses are configured; each may stand for several nodes."""
        return len(self._addresses)

    async def in_turn(self) -> list[str]:
        """host:port of every node there is now, beginning with another one each time."""
        nodes = await self._found()
        self._next = (self._next + 1) % max(1, len(nodes))
        return nodes[self._next :] + nodes[: self._next]

    async def _found(self) -> list[str]:
        """host:port of every node there is now.

        A name that never resolved gives no node, and a line in the log; one that does no more
        gives those that it gave last. Idle channels are opened anew once the files of this node's
        credentials have changed, or nothing came over them.
        """
        found: dict[str, str | None] = {}
        for address in self._addresses:
            # An address is its own name, to which a certificate is compared.
            name = None if address.is_literal else address.host
            for node in await self._names.nodes_of(address, self._is_connected):
                found.setdefault(node, name)
        credentials = self._credentials.current()
        left = []
        for node in list(self._channels):
            is_current = node in found and self._opened_with[node] is credentials
            is_current = is_current and node not in self._silent
            # Running hand-offs end by themselves, over what they began with.
            if not is_current and not self._calls.get(node):
                left.append(self._channels.pop(node))
        for node, name in found.items():
            if node not in self._channels:
                self._open(node, server_name=name)
        for channel in left:
            await channel.close()
        return list(found)

    async def by_load(self, prompt_tokens: int) -> list[str]:
        """host:port of every node there is now but those that drain, the one first that has least
        to do before a prompt of so many tokens, and of several the one that has least to do.

        Equally busy ones are in turn. Who does not say its load in time comes last.
        """
        nodes = await self.in_turn()
        if len(nodes) < 2:
            return nodes
        loads = await asyncio.gather(*(self._load(node, prompt_tokens) for node in nodes))
        told = [
            (load.tokens_before, load.pending_tokens, node)
            for load, node in zip(loads, nodes, strict=True)
            if load is not None and not load.is_draining
        ]
        silent = [node for load, node in zip(loads, nodes, strict=True) if load is None]
        return [node for *_, node in sorted(told, key=lambda one: one[:2])] + silent

    async def least_load(self, prompt_tokens: int) -> NodeLoad:
        """The load of the node where a prompt of so many tokens waits least; none if none says
        so in time."""
        nodes = list(self._channels)
        loads = await asyncio.gather(*(self._load(node, prompt_tokens) for node in nodes))
        told = [load for load in loads if load is not None and not load.is_draining]
        return min(told, key=lambda load: load.tokens_before, default=NodeLoad())

    async def _load(self, node: str, prompt_tokens: int) -> NodeLoad | None:
        """Load of a node; None if it does not answer in time."""
        async with self.channel(node) as channel:
            stub = handoff_pb2_grpc.PrefillNodeStub(channel)
            try:
                answer = await stub.GetPrefillLoad(
                    handoff_pb2.GetPrefillLoadRequest(prompt_tokens=prompt_tokens),
                    timeout=LOAD_SECONDS,
                )
            except grpc.aio.AioRpcError as error:
                _log.warning(
                    event(
                        "prefill node does not tell its load", node=node, status=error.code().name
                    )
                )
                return None
        # It has not counted these yet. Of those that come together the shorter ones go first.
        sent = self._sent.get(node, [])
        sent_before = sum(tokens for tokens in sent if tokens <= prompt_tokens)
        is_told = answer.HasField("seconds_before")
        before = answer.tokens_before if is_told else answer.pending_tokens
        return NodeLoad(
            tokens_before=before + sent_before,
            pending_tokens=answer.pending_tokens + sum(sent),
            seconds_before=answer.seconds_before,
            other_tokens=sent_before if is_told else before + sent_before,
            is_draining=answer.is_draining,
        )

    async def refusals(self, seconds: float) -> dict[str, str]:
        """Reasons for which nodes that are there take no prompts; "" of one that does take them."""
        nodes = await self._found()
        return dict(
            zip(
                nodes,
                await asyncio.gather(*(self._refusal(n, seconds) for n in nodes)),
                strict=True,
            )
        )

    async def _refusal(self, node: str, seconds: float) -> str:
        async with self.channel(node) as channel:
            stub = handoff_pb2_grpc.PrefillNodeStub(channel)
            try:
                answer = await stub.GetPrefillLoad(
                    handoff_pb2.GetPrefillLoadRequest(), timeout=seconds
                )
            except grpc.aio.AioRpcError as error:
                is_reason = error.code() in _TAKES_NOTHING
                return str(error_from_rpc(error)) if is_reason else ""
        return "it is draining" if answer.is_draining else ""

    async def answers(self, node: str, seconds: float) -> bool:
        """Whether anything comes back from a node within so many seconds, be it a refusal."""
        async with self.channel(node) as channel:
            stub = handoff_pb2_grpc.PrefillNodeStub(channel)
            try:
                await stub.GetPrefillLoad(handoff_pb2.GetPrefillLoadRequest(), timeout=seconds)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    self._silent.add(node)
                    return False
        return True

    async def renew(self, node: str) -> None:
        """Connect anew to a node, whose connection has broken, unless other calls still use it."""
        self._silent.add(node)
        await self.in_turn()

    @asynccontextmanager
    async def channel(self, node: str) -> AsyncIterator[grpc.aio.Channel]:
        """The channel to a node (host:port) that `in_turn` gave; open until the block ends."""
        if node not in self._channels:
            self._open(node)
        self._calls[node] = self._calls.get(node, 0) + 1
        try:
            yield self._channels[node]
        finally:
            self._calls[node] -= 1

    @contextmanager
    def sending(self, node: str, tokens: int) -> Iterator[Callable[[], None]]:
        """Count a prompt of so many tokens as one that a node has to compute, until what the block
        gets is called: the node has said something of it, and counts it itself; or it ends.
        """
        sent = self._sent.setdefault(node, [])
        sent.append(tokens)
        is_counted = True

        def said() -> None:
            nonlocal is_counted
            if is_counted:
                sent.remove(tokens)
            is_counted = False

        try:
            yield said
        finally:
            said()

    def _open(self, node: str, server_name: str | None = None) -> None:
        credentials = self._credentials.current()
        self._channels[node] = open_channel(
            node, self._client, server_name=server_name, credentials=credentials
        )
        self._opened_with[node] = credentials
        self._silent.discard(node)

    def _is_connected(self, node: str) -> bool:
        channel = self._channels.get(node)
        return channel is not None and channel.get_state() is grpc.ChannelConnectivity.READY

    async def close(self) -> None:
        """Close all channels; streams that still run are cancelled."""
        for channel in self._channels.values():
            await channel.close()
