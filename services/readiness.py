"""Readiness of a node for work, told alike by health service, metrics, /ready and log."""

from __future__ import annotations

import logging

from fluxion_core.observe.log import event
from fluxion_core.wire.server import NodeServer
from services.metrics import NodeMetrics

_log = logging.getLogger(__name__)


class Readiness:
    """A node's readiness. On the event loop only.

    Args:
        server: its health says it, and it takes calls from `loaded` to `drain`.
        metrics: say it too.
        facts: of the node, for the log's line that it is ready.
    """

    def __init__(self, server: NodeServer, metrics: NodeMetrics, **facts: object) -> None:
        self._server = server
        self._metrics = metrics
        self._facts = facts
        self._is_draining = False

    async def loaded(self, why_not: str = "") -> None:
        """Take calls from now on; ready, unless something else is still wanting."""
        self._server.open()
        await self.tell(why_not)

    async def tell(self, why_not: str) -> None:
        """Set why the node is not ready; empty if it is. What it takes of calls stays as it is."""
        if self._is_draining or why_not == self._metrics.why_not_ready:
            return
        self._metrics.why_not_ready = why_not
        await self._server.set_serving(is_serving=not why_not)
        if why_not:
            _log.warning(event("not ready", reason=why_not))
        else:
            _log.info(event("ready", **self._facts))

    async def drain(self) -> None:
        """Take no further calls, and be not ready, for good."""
        self._is_draining = True
        self._metrics.why_not_ready = "the node is draining"
        await self._server.set_ready(is_ready=False)
