"""A small HTTP server, beside the event loop, that nobody can block or exhaust.

One connection is one request and has a thread; there are at most MAX_CONNECTIONS. Who connects and
says nothing has REQUEST_SECONDS, and gives way at once when others come; who does not read has
SEND_SECONDS. What is answered is the application's to say (metrics_endpoint.py).
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import ServerHandler, WSGIRequestHandler, WSGIServer

from fluxion_core.config.addresses import Address
from fluxion_core.errors import ThreadLimitError
from fluxion_core.machine.threads import start_thread
from fluxion_core.observe.log import event

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

_log = logging.getLogger(__name__)

MAX_CONNECTIONS = 32
REQUEST_SECONDS = 10.0
"""For a request to have come, whole."""
SEND_SECONDS = 10.0
"""For one piece of an answer to be taken."""

_MAX_LINE_BYTES = 1 << 16

Application = Callable[["WSGIEnvironment", "StartResponse"], Iterable[bytes]]


@dataclass
class _Connection:
    """One connection that is open."""

    since: float
    """Monotonic seconds."""
    has_asked: bool = False
    """Its request has come."""


class HttpServer(ThreadingMixIn, WSGIServer):
    """Serves one application, a thread a connection: a slow answer does not hold up another.

    Args:
        address: to listen at.
        application: answers requests.
        answer_seconds: for a connection in all.
        clock: monotonic seconds.

    Raises:
        OSError: the address cannot be bound.
    """

    daemon_threads = True
    request_queue_size = 2 * MAX_CONNECTIONS

    def __init__(
        self,
        address: Address,
        application: Application,
        *,
        answer_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._answer_seconds = answer_seconds
        self._clock = clock
        self._connections: dict[socket.socket, _Connection] = {}
        self._lock = threading.Lock()
        family, _, _, _, where = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM
        )[0]
        self.address_family = family
        self._host = address.host
        super().__init__(where[:2], _RequestHandler)  # type: ignore[arg-type]
        self.set_app(application)

    @property
    def address(self) -> Address:
        """The address as bound."""
        return Address(self._host, self.server_port)

    def server_bind(self) -> None:
        """Bind without looking up this machine's name, which may take long.

        [::] takes IPv4 too, as gRPC's listeners do.
        """
        if self.address_family is socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self._host, self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection a thread, if there is one for it."""
        with self._lock:
            has_room = len(self._connections) < MAX_CONNECTIONS or self._drop_a_silent_one()
            if has_room:
                self._connections[request] = _Connection(self._clock())
        if not has_room:
            self.shutdown_request(request)
            return
        try:
            start_thread(
                "metrics-request", lambda: self.process_request_thread(request, client_address)
            )
        except ThreadLimitError as error:
            _log.warning(event("metrics not served", error=str(error)))
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, whose place is free then."""
        with self._lock:
            self._connections.pop(request, None)
        super().shutdown_request(request)

    def asked(self, request: socket.socket) -> None:
        """Note that the request of this connection has come."""
        with self._lock:
            if (connection := self._connections.get(request)) is not None:
                connection.has_asked = True

    def service_actions(self) -> None:
        """End connections that take too long; called between looks for new ones, twice a second."""
        now = self._clock()
        with self._lock:
            late = [
                request
                for request, connection in self._connections.items()
                if now - connection.since
                > (self._answer_seconds if connection.has_asked else REQUEST_SECONDS)
            ]
            for request in late:
                self._hang_up(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log at most: a peer that goes away, or takes too long, is no error of this node."""
        del request
        _log.debug(event("metrics connection ended", peer=client_address), exc_info=True)

    def _drop_a_silent_one(self) -> bool:
        """Make room by ending the oldest of those that have not asked for anything yet."""
        for request, connection in self._connections.items():
            if not connection.has_asked:
                self._hang_up(request)
                del self._connections[request]
                return True
        return False

    @staticmethod
    def _hang_up(request: socket.socket) -> None:
        """Its thread finds the end of the stream, and closes it."""
        try:
            request.shutdown(socket.SHUT_RDWR)
        except OSError:
            return


class _RequestHandler(WSGIRequestHandler):
    """One request, after which the connection ends."""

    timeout = SEND_SECONDS
    server: HttpServer

    def handle(self) -> None:
        """Answer a request; if its reader goes away, without a word."""
        self.raw_requestline = self.rfile.readline(_MAX_LINE_BYTES + 1)
        if len(self.raw_requestline) > _MAX_LINE_BYTES:
            self.requestline, self.request_version, self.command = "", "", ""
            self.send_error(HTTPStatus.REQUEST_URI_TOO_LONG)
            return
        if not self.parse_request():
            return
        self.server.asked(self.request)
        answer = _ResponseHandler(
            self.rfile,
            self.wfile,  # type: ignore[arg-type]
            self.get_stderr(),
            self.get_environ(),
            multithread=False,
        )
        answer.request_handler = self  # type: ignore[attr-defined]
        application = self.server.get_app()
        assert application is not None
        answer.run(application)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        """Log nothing: a scrape is not worth a line."""
        del format, args


class _ResponseHandler(ServerHandler):
    """The answer to one request."""

    def log_exception(self, exc_info: Any) -> None:
        """Log bugs; a reader that is too slow is its own affair."""
        if not isinstance(exc_info[1], OSError):
            _log.error(event("metrics failed"), exc_info=exc_info)
