"""Look-up of the name of prefill nodes: all its addresses, and the last ones known while it
cannot be looked up.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import replace

from fluxion_core.config.addresses import Address
from fluxion_core.observe.log import event

_log = logging.getLogger(__name__)

_NO_SUCH_NAME = {socket.EAI_NONAME, socket.EAI_NODATA}


class NodeNames:
    """Looks names up. On the event loop only.

    Args:
        seconds: for one look-up; a resolver that takes longer has failed.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last: dict[Address, list[str]] = {}

    async def nodes_of(self, address: Address, is_connected: Callable[[str], bool]) -> list[str]:
        """HOST:PORT of every address of a name, sorted; an address stands for itself.

        IPv4 addresses if there are any, else IPv6 ones: a node that has both is one node. If the
        look-up fails, the nodes that it gave last; if the answer is that there is no such name,
        those of them that are connected. What became of them, the next call to each will say.

        Args:
            address: host and port.
            is_connected: whether there is a connection to a node now.
        """
        if address.is_literal:
            return [str(address)]
        try:
            async with asyncio.timeout(self._seconds):
                found = await _look_up(address)
        except (OSError, UnicodeError) as error:
            # A timeout is an OSError.
            known = self._last.get(address, [])
            if isinstance(error, socket.gaierror) and error.errno in _NO_SUCH_NAME:
                known = [node for node in known if is_connected(node)]
            _log.warning(
                event(
                    "prefill node not found",
                    host=address.host,
                    error=str(error) or f"no answer within {self._seconds:g} s",
                    last_known=",".join(known) or "none",
                )
            )
            return known
        self._last[address] = found
        return found


async def _look_up(address: Address) -> list[str]:
    loop = asyncio.get_running_loop()
    answers = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    hosts = {family: set[str]() for family in (socket.AF_INET, socket.AF_INET6)}
    for family, _, _, _, where in answers:
        if family in hosts:
            hosts[family].add(str(where[0]))
    best = hosts[socket.AF_INET] or hosts[socket.AF_INET6]
    return [str(replace(address, host=one)) for one in sorted(best)]
