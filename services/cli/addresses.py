"""Addresses at which nodes listen on this machine: the default address, and ports that are free."""

from __future__ import annotations

import random
import socket
from collections.abc import Collection

from fluxion_core.config.addresses import Address, address_of
from fluxion_core.errors import ConfigError

DEFAULT_GATEWAY_ADDRESS = "127.0.0.1:7480"
"""Where `fluxion up --gateway` puts the gateway if it can."""

_PORTS_NOT_HANDED_OUT = range(20_000, 32_000)
"""Below what Linux (32768) and IANA (49152) hand to outgoing connections and to port 0."""


def choose_listen_address(
    wanted: str | None, *, preferred: str, flag: str, promised: Collection[int] = ()
) -> Address:
    """Settle on an address that can be bound now.

    Another process may still take the port before the node does; the node then says so.

    Args:
        wanted: what the user asked for; port 0 for any free one; None for no wish.
        preferred: taken if nothing was wished for and it is free.
        flag: the flag's name, for the error's remedy.
        promised: ports given to nodes that have not bound them yet.

    Raises:
        ConfigError: the wish is malformed, in use, or not an address of this machine.
    """
    asked = address_of(preferred if wanted is None else wanted, flag, may_choose_port=True)
    free_port = _bindable_port(asked.host, asked.port, promised)
    if free_port is None and wanted is None:
        free_port = _bindable_port(asked.host, 0, promised)
    if free_port is None:
        raise ConfigError(
            f"{flag} {asked}: this address is in use or not of this machine; "
            f"give another, or port 0 for a free one"
        )
    return Address(asked.host, free_port)


def _bindable_port(host: str, port: int, promised: Collection[int]) -> int | None:
    """The port if it can be bound now, for port 0 one that can; None if that fails.

    A port of the system's choosing (bind to 0) may go to any outgoing connection before the node
    binds it, so port 0 takes one that nobody is handed.
    """
    candidates = random.sample(_PORTS_NOT_HANDED_OUT, k=64) if port == 0 else [port]
    for candidate in candidates:
        if candidate not in promised and _is_bindable(host, candidate):
            return candidate
    return None


def _is_bindable(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As gRPC does: a port whose last connections are still in TIME_WAIT counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
