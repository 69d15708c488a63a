"""The endpoint of a node's metrics: plain HTTP on `server.metrics_listen`, beside the event loop.

GET /metrics for Prometheus, GET /ready for probes, GET /trace?steps=N for `fluxion trace` where the
node records traces. It shows no prompts and no generated text.

One connection is one request and has a thread; there are at most MAX_CONNECTIONS. Who connects and
says nothing has REQUEST_SECONDS, and gives way at once when others come; who does not read has
SEND_SECONDS.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs
from wsgiref.simple_server import ServerHandler, WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app

from fluxion_core.config.addresses import Address
from fluxion_core.errors import ConfigError, FluxionError, ThreadLimitError
from fluxion_core.machine.threads import start_thread
from fluxion_core.observe.log import event
from services.metrics import NodeMetrics

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

_log = logging.getLogger(__name__)

MAX_CONNECTIONS = 32
REQUEST_SECONDS = 10.0
"""For a request to have come, whole."""
SEND_SECONDS = 10.0
"""For one piece of an answer to be taken."""
MAX_TRACE_STEPS = 10_000
MAX_TRACE_SECONDS = 60.0
ANSWER_SECONDS = 2 * MAX_TRACE_SECONDS
"""For a connection in all: a trace that is recorded, then sent."""
TRACE_PAUSE_SECONDS = 0.001
"""Between pieces of a trace's file."""

OK = "200 OK"
_MAX_LINE_BYTES = 1 << 16


class MetricsEndpoint:
    """Serves a node's metrics over HTTP until closed.

    Args:
        listen: host:port; empty for no endpoint.
        metrics: what is served.

    Raises:
        ConfigError: the address is malformed or cannot be bound.
        ThreadLimitError: its thread could not be started.
    """

    def __init__(self, listen: str, metrics: NodeMetrics) -> None:
        self._server: _Server | None = None
        self._metrics = metrics
        if not listen:
            return
        registry = CollectorRegistry(auto_describe=False)
        registry.register(metrics)
        ProcessCollector(registry=registry)
        try:
            address = Address.parse(listen, may_choose_port=True)
            self._server = _Server(address, _application(registry, metrics))
        except ValueError as error:
            raise ConfigError(f"server.metrics_listen {error}") from None
        except OSError as error:
            raise ConfigError(
                f"server.metrics_listen {listen}: {error.strerror or error}"
            ) from None
        start_thread("metrics-endpoint", self._server.serve_forever)
        _log.info(event("metrics", address=self.address))

    @property
    def address(self) -> str:
        """host:port as bound; empty where there is no endpoint."""
        return "" if self._server is None else str(self._server.address)

    def close(self) -> None:
        """Stop serving and collecting. Idempotent."""
        self._metrics.close()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


@dataclass
class _Connection:
    since: float
    """Monotonic seconds."""
    has_asked: bool = False
    """Its request has come."""


class _Server(ThreadingMixIn, WSGIServer):
    """One thread a connection: a trace that takes its time does not hold up a scrape."""

    daemon_threads = True
    request_queue_size = 2 * MAX_CONNECTIONS

    def __init__(
        self,
        address: Address,
        application: Application,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._connections: dict[socket.socket, _Connection] = {}
        self._lock = threading.Lock()
        family, _, _, _, where = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM
        )[0]
        self.address_family = family
        self._host = address.host
        super().__init__(where[:2], _Request)  # type: ignore[arg-type]
        self.set_app(application)

    @property
    def address(self) -> Address:
        """As bound."""
        return Address(self._host, self.server_port)

    def server_bind(self) -> None:
        """Bind without looking up this machine's name, which may take long; [::] takes IPv4 too, as
        gRPC's listeners do."""
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
        """The request of this connection has come."""
        with self._lock:
            if (connection := self._connections.get(request)) is not None:
                connection.has_asked = True

    def service_actions(self) -> None:
        """Between looks for new connections, twice a second: end those that take too long."""
        now = self._clock()
        with self._lock:
            late = [
                request
                for request, connection in self._connections.items()
                if now - connection.since
                > (ANSWER_SECONDS if connection.has_asked else REQUEST_SECONDS)
            ]
            for request in late:
                self._hang_up(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that goes away, or takes too long, is no error of this node."""
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


class _Request(WSGIRequestHandler):
    """One request, after which the connection ends."""

    timeout = SEND_SECONDS
    server: _Server

    def handle(self) -> None:
        """As the base's, with an answer that keeps quiet when its reader goes away."""
        self.raw_requestline = self.rfile.readline(_MAX_LINE_BYTES + 1)
        if len(self.raw_requestline) > _MAX_LINE_BYTES:
            self.requestline, self.request_version, self.command = "", "", ""
            self.send_error(HTTPStatus.REQUEST_URI_TOO_LONG)
            return
        if not self.parse_request():
            return
        self.server.asked(self.request)
        answer = _Answer(
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
        """A scrape is not worth a log line."""
        del format, args


class _Answer(ServerHandler):
    def log_exception(self, exc_info: Any) -> None:
        """A reader that is too slow is its own affair; anything else is a bug."""
        if not isinstance(exc_info[1], OSError):
            _log.error(event("metrics failed"), exc_info=exc_info)


Application = Callable[["WSGIEnvironment", "StartResponse"], Iterable[bytes]]


def _application(registry: CollectorRegistry, metrics: NodeMetrics) -> Application:
    serve_metrics: Application = make_wsgi_app(registry)

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        body: Iterable[str]
        match environ.get("PATH_INFO", ""):
            case "/metrics":
                return serve_metrics(environ, start_response)
            case "/ready":
                status, body = _ready(metrics)
            case "/trace":
                status, body = _trace(environ.get("QUERY_STRING", ""), metrics)
            case _:
                status, body = "404 Not Found", ["only /metrics, /ready and /trace are here\n"]
        is_trace = status == OK and environ["PATH_INFO"] == "/trace"
        kind = "application/json" if is_trace else "text/plain"
        start_response(status, [("Content-Type", f"{kind}; charset=utf-8")])
        return (piece.encode() for piece in body)

    return application


def _ready(metrics: NodeMetrics) -> tuple[str, Iterable[str]]:
    """Status line and one sentence."""
    if not metrics.why_not_ready:
        return OK, ["ready\n"]
    return "503 Service Unavailable", [f"not ready: {metrics.why_not_ready}\n"]


def _trace(query: str, metrics: NodeMetrics) -> tuple[str, Iterable[str]]:
    """Status line and body: a file in the Trace Event Format, or one sentence."""
    if metrics.take_trace is None:
        return "404 Not Found", ["this node records no traces, or is still loading its model\n"]
    fields = parse_qs(query)
    try:
        steps = int(fields.get("steps", ["20"])[0])
        seconds = float(fields.get("seconds", ["10"])[0])
    except ValueError:
        return "400 Bad Request", ["steps and seconds are numbers\n"]
    if not (1 <= steps <= MAX_TRACE_STEPS and 0 < seconds <= MAX_TRACE_SECONDS):
        limits = f"steps 1 to {MAX_TRACE_STEPS}, seconds up to {MAX_TRACE_SECONDS:g}"
        return "400 Bad Request", [f"{limits}; asked for {steps} and {seconds:g}\n"]
    try:
        trace = metrics.take_trace(steps, seconds)
    except FluxionError as error:
        return "409 Conflict", [f"{error}\n"]
    return OK, _unhurried(metrics.trace_pieces(trace))


def _unhurried(pieces: Iterator[str]) -> Iterator[str]:
    """With a pause after each: the engine's thread needs the interpreter hundreds of times a step,
    and would wait 5 ms each time for a thread that does not let go of it."""
    for piece in pieces:
        yield piece
        time.sleep(TRACE_PAUSE_SECONDS)
