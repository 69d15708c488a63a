"""The prefill node's data plane: what KV leaves on beside the calls that ask for it.

A hand-off that asks for KV names the ways it can take; this node chooses one. For a way beside the
call it makes an endpoint, of which HEADER tells, lets the connections in that come with it
(data_listener.py), and gives them to native threads (departures.py). When the call ends, so does
all of it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace

from fluxion_core.config.addresses import Address
from fluxion_core.config.carriers import Carrier
from fluxion_core.errors import ConfigError, NoCommonWayError
from fluxion_core.geometry import KvGeometry
from fluxion_core.kernels import _native
from fluxion_core.kvstream.handoff import (
    FRAME_PAYLOAD_BYTES,
    Endpoint,
    max_frame_payload_bytes,
)
from fluxion_core.wire.codec import CALL_ID_BYTES, SECRET_BYTES
from fluxion_core.wire.plane import machine_id
from services.prefill.config import PrefillNodeSettings
from services.prefill.data_listener import DataListener, Ticket
from services.prefill.departures import PlaneDeparture


class DataPlane:
    """Listeners, native threads, and the departures that use them.

    Args:
        settings: of the node.
    """

    def __init__(self, settings: PrefillNodeSettings) -> None:
        self._slot_bytes = FRAME_PAYLOAD_BYTES
        self._settings = settings.handoff
        self._server = settings.server
        self._has_tls = settings.server.tls.certificate is not None
        self._machine = machine_id()
        self._listener = DataListener()
        self._departures: set[PlaneDeparture] = set()
        self._threads: _native.IoThreads | None = None

    @property
    def ways(self) -> tuple[Carrier, ...]:
        """Ways that this node offers, the preferred one first."""
        return self._settings.ways

    @property
    def data_address(self) -> str:
        """HOST:PORT as bound; empty without sockets."""
        if not self._listener.port:
            return ""
        return str(replace(self._wanted_address(), port=self._listener.port))

    @property
    def refusals(self) -> dict[tuple[str, ...], int]:
        """Connections that were not let in, by (reason,)."""
        return {(reason,): count for reason, count in self._listener.refusals.items()}

    def cpu_seconds(self) -> float:
        """Processor time of the native threads so far. From any thread."""
        return 0.0 if self._threads is None else self._threads.cpu_seconds()

    def start(self) -> None:
        """Listen, as far as the ways of the settings need it. On the event loop.

        Raises:
            ConfigError: the address cannot be bound, or sockets want TLS and there is none.
        """
        if Carrier.SOCKETS in self.ways:
            if self._has_tls and (missing := _native.tls_missing()):
                raise ConfigError(
                    f"handoff.ways has sockets, which are under TLS here: {missing}; install "
                    f"OpenSSL 3, or leave sockets out"
                )
            setting = "handoff.listen" if self._settings.listen else "server.listen (handoff)"
            self._listener.listen_tcp(str(self._wanted_address()), setting)
        if Carrier.SHARED_MEMORY in self.ways:
            self._listener.listen_unix()
        if set(self.ways) != {Carrier.GRPC}:
            self._threads = _native.IoThreads(self._settings.num_threads)

    def loaded(self, geometry: KvGeometry) -> None:
        """Learn of the KV that is to leave, before any does."""
        self._slot_bytes = max_frame_payload_bytes(geometry)

    def choose(self, ways: Sequence[Carrier], machine: str) -> Carrier:
        """The way of a hand-off: the first of this node's own that the decode node has too.

        Args:
            ways: that the decode node can take.
            machine: its machine id.

        Raises:
            NoCommonWayError: there is none.
        """
        is_here = bool(machine) and machine == self._machine
        for way in self.ways:
            if way in ways and (is_here or way is not Carrier.SHARED_MEMORY):
                return way
        raise NoCommonWayError(self.ways, ways, is_one_machine=is_here)

    def depart(
        self,
        way: Carrier,
        *,
        max_connections: int,
        on_taken: Callable[[], None],
    ) -> PlaneDeparture:
        """Let KV of a new hand-off leave on a way beside its call.

        Args:
            way: sockets or shared memory, as chosen.
            max_connections: that the decode node will make; those of the settings, if they are
                fewer.
            on_taken: told, on the event loop, when frames were taken.
        """
        assert self._threads is not None
        endpoint = Endpoint(
            way=way,
            call_id=secrets.token_bytes(CALL_ID_BYTES),
            secret=secrets.token_bytes(SECRET_BYTES),
            connections=min(self._settings.connections, max_connections),
            port=self._listener.port if way is Carrier.SOCKETS else 0,
            unix_name=self._listener.unix_name if way is Carrier.SHARED_MEMORY else "",
            tls=self._has_tls and way is Carrier.SOCKETS,
        )
        departure = PlaneDeparture(
            self._threads,
            asyncio.get_running_loop(),
            endpoint,
            slot_bytes=self._slot_bytes,
            unread_seconds=self._server.unread_seconds,
            on_taken=on_taken,
            on_closed=self._departures.discard,
        )
        self._departures.add(departure)
        self._listener.add(Ticket(endpoint, departure.add_connection))
        return departure

    def end(self, departure: PlaneDeparture) -> None:
        """Let no connection of it in any more, and close it."""
        self._listener.remove(departure.endpoint.call_id)
        departure.close()

    async def stop(self) -> None:
        """Close everything. Idempotent."""
        await self._listener.stop()
        for departure in list(self._departures):
            departure.close_now()
        if self._threads is not None:
            self._threads.close()

    def _wanted_address(self) -> Address:
        if self._settings.listen:
            return Address.parse(self._settings.listen, may_choose_port=True)
        return replace(Address.parse(self._server.listen, may_choose_port=True), port=0)
