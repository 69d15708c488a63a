"""KV that comes beside its call: which ways this node takes it, and how it lands in a sequence.

The HEADER of a hand-off may say where its KV is fetched. Then this node dials (kv_connections.py)
and gives the connections to native threads, which check, digest and write frames without the event
loop. The loop hears of it by an eventfd: when all has landed, when something is wrong, and now and
then in between. The call stays the lease of all of it.

On the event loop only, but for `DataPlane.cpu_seconds`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from fluxion_core.config.carriers import Carrier
from fluxion_core.config.settings import ClientSettings, HandoffSettings
from fluxion_core.errors import ConfigError, FluxionError, PeerUnavailableError
from fluxion_core.geometry import KvGeometry
from fluxion_core.kernels import _native
from fluxion_core.kernels.isa import native_layout
from fluxion_core.kernels.plane_fault import plane_error
from fluxion_core.kvstore.sequence import LandingPlace, SequenceKv
from fluxion_core.kvstream.handoff import Endpoint
from fluxion_core.observe.log import event
from fluxion_core.wire.codec import WAY_NUMBERS
from fluxion_core.wire.plane import machine_id
from fluxion_proto.v1 import handoff_pb2
from services.decode.kv_connections import dial

_log = logging.getLogger(__name__)

NICENESS = 10
"""Of threads that take KV in, over the node's own: where they share a CPU with a thread at a step
they have a tenth of it, and all of it while that sleeps."""


@dataclass(frozen=True)
class LandingState:
    """Progress of a landing."""

    payload_bytes: int
    """Of the frames that were taken in."""
    num_chunks: int
    tokens_taken: int
    """Tokens whose KV is there, from the prompt's first; a layer counts for its share."""
    received_bytes: int
    """All that came over the connections, frames under way included. By shared memory these are
    frames without their payload."""
    is_whole: bool
    error: FluxionError | None
    """The first thing that was wrong; nothing is taken in after it."""


NOTHING_LANDED = LandingState(0, 0, 0, 0, is_whole=False, error=None)


class IncomingKv:
    """A prompt's KV on its way from connections into slabs: a `Landing` of its sequence.

    Args:
        threads: take it in.
        geometry: of the store.
        place: where it is written.
        changed: called when there is something new to see in `state`.
    """

    def __init__(
        self,
        threads: _native.IoThreads,
        geometry: KvGeometry,
        place: LandingPlace,
        changed: Callable[[], None],
    ) -> None:
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._is_over = asyncio.Event()
        self._is_closed = False
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._landing = _native.KvLanding(
            threads,
            native_layout(geometry),
            slabs=place.slab_addresses,
            num_tokens=place.num_tokens,
            kv_from_token=place.kv_from_token,
            event_fd=self._event_fd,
        )
        self._loop.add_reader(self._event_fd, self._look)

    @property
    def state(self) -> LandingState:
        """Progress up to now, also after `close`."""
        payload_bytes, chunks, tokens, received, is_whole, fault = self._landing.state()
        error = None if fault is None else plane_error(fault)
        return LandingState(payload_bytes, chunks, tokens, received, is_whole, error)

    @property
    def whole_tokens(self) -> int:
        """Tokens that are written in every layer; see `Landing`."""
        return self._landing.whole_tokens

    def add(self, connection: int, of: int, fd: int, endpoint: Endpoint) -> None:
        """Take frames from a connection that is ready for them; its descriptor is taken over."""
        if endpoint.way is Carrier.SHARED_MEMORY:
            self._landing.add(fd, "ring", connection, of)
        elif endpoint.tls:
            self._landing.add(fd, "tls", connection, of, endpoint.secret, endpoint.call_id)
        else:
            self._landing.add(fd, "plain", connection, of)

    async def whole(self, stall_seconds: float) -> LandingState:
        """The state once everything has landed.

        Args:
            stall_seconds: that nothing may come.

        Raises:
            HandoffError, PeerUnavailableError: what is wrong with a connection or a frame.
            PeerUnavailableError: nothing came for so long.
        """
        while not self._is_over.is_set():
            before = self.state.received_bytes
            with suppress(TimeoutError):
                async with asyncio.timeout(stall_seconds):
                    await self._is_over.wait()
            if not self._is_over.is_set() and self.state.received_bytes == before:
                raise PeerUnavailableError(
                    f"the rest of the KV did not come for {stall_seconds:g} s "
                    f"(prefill.stall_seconds), though the node has sent it"
                )
        state = self.state
        if state.error is not None:
            raise state.error
        return state

    def close(self) -> None:
        """Close the connections; afterwards no thread touches slabs. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._landing.close()
        self._loop.remove_reader(self._event_fd)
        os.close(self._event_fd)
        # Whose it is holds this landing: neither is to wait for a collection of cycles.
        self._changed = _nothing

    def _look(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._event_fd)
        state = self.state
        if state.is_whole or state.error is not None:
            self._is_over.set()
        self._changed()


def _nothing() -> None:
    pass


class DataPlane:
    """The ways that a decode node takes KV, and its threads for those beside the call.

    Args:
        settings: which ways, how many connections and threads.
        client: how prefill nodes are called; with TLS, KV comes encrypted too.
        geometry: of the store.
        cpus: that the threads may run on; none for all.

    Raises:
        ConfigError: none of the ways is possible here.
        RuntimeError: no further thread is to be had; see threads.thread_limit.
    """

    def __init__(
        self,
        settings: HandoffSettings,
        client: ClientSettings,
        geometry: KvGeometry,
        cpus: Sequence[int] = (),
    ) -> None:
        self._settings, self._client, self._geometry = settings, client, geometry
        self._machine = machine_id() if Carrier.SHARED_MEMORY in settings.ways else ""
        self.ways = tuple(way for way in settings.ways if not self._why_not(way))
        """That prefill nodes are told of, in order of preference."""
        if not self.ways:
            raise ConfigError(
                f"no way is left for KV: handoff.ways has {', '.join(settings.ways)} alone, and "
                f"{self._why_not(settings.ways[0])}"
            )
        self._threads: _native.IoThreads | None = None
        for way in settings.ways:
            if why_not := self._why_not(way):
                _log.warning(event("KV cannot come this way", way=way.value, reason=why_not))
        if any(way is not Carrier.GRPC for way in self.ways):
            self._threads = _native.IoThreads(settings.num_threads, list(cpus), NICENESS)

    def add_ways(self, request: handoff_pb2.HandoffRequest) -> None:
        """Say in a request which ways this node takes KV."""
        request.ways.extend(WAY_NUMBERS[way] for way in self.ways)
        request.machine = self._machine
        request.max_connections = self._settings.connections

    def check(self, endpoint: Endpoint | None) -> None:
        """Refuse a HEADER's answer that is none to what this node can.

        Args:
            endpoint: of the HEADER; None: KV comes with the call.

        Raises:
            PeerUnavailableError: a way that was not named, more connections than were allowed, or
                no encryption beside an encrypted call.
        """
        way = Carrier.GRPC if endpoint is None else endpoint.way
        if way not in self.ways:
            raise PeerUnavailableError(
                f"it sends KV by {way}, and this node takes it by {', '.join(self.ways)} "
                f"(handoff.ways)"
            )
        if endpoint is None:
            return
        if endpoint.connections > self._settings.connections:
            raise PeerUnavailableError(
                f"it asks for {endpoint.connections} connections, and was allowed "
                f"{self._settings.connections} (handoff.connections)"
            )
        if way is Carrier.SOCKETS and self._is_encrypted and not endpoint.tls:
            raise PeerUnavailableError(
                "it would send KV unencrypted, and is called over TLS: does its certificate "
                'belong to something between the nodes? Then set handoff.ways = ["grpc"]'
            )

    def _why_not(self, way: Carrier) -> str:
        """A reason for which a way is not possible here; empty if it is."""
        if way is Carrier.SHARED_MEMORY and not self._machine:
            return "this machine cannot be told from others (/proc/sys/kernel/random/boot_id)"
        if way is Carrier.SOCKETS and self._is_encrypted and (missing := _native.tls_missing()):
            return f"sockets beside a call over TLS need OpenSSL 3: {missing}"
        return ""

    @property
    def _is_encrypted(self) -> bool:
        return self._client.tls.authority is not None

    async def fetch(
        self, endpoint: Endpoint, node: str, sequence: SequenceKv, changed: Callable[[], None]
    ) -> IncomingKv:
        """Connect to where a hand-off's KV is, and let it land in its sequence.

        Args:
            endpoint: that `check` let pass.
            node: host:port of the prefill node, as its channel has it.
            sequence: takes the KV; it closes the landing when it is restarted or released.
            changed: see `IncomingKv`.

        Raises:
            PeerUnavailableError: see `dial`.
        """
        assert self._threads is not None, "a way was checked that was not named"
        threads = self._threads
        connections = await dial(endpoint, node, self._client.connect_seconds)
        with ExitStack() as closing:
            for connection in connections:
                closing.enter_context(connection)
            incoming = sequence.open_landing(
                lambda place: IncomingKv(threads, self._geometry, place, changed)
            )
            for number, connection in enumerate(connections):
                incoming.add(number, len(connections), connection.detach(), endpoint)
        return incoming

    def cpu_seconds(self) -> float:
        """CPU time of the threads up to now."""
        return 0.0 if self._threads is None else self._threads.cpu_seconds()

    def close(self) -> None:
        """End the threads; every landing has been closed before. Idempotent."""
        if self._threads is not None:
            self._threads.close()
