"""The endpoint of a node's metrics: plain HTTP on `server.metrics_listen`, beside the event loop.

GET /metrics for Prometheus, GET /ready for probes, GET /trace?steps=N for `fluxion trace` where the
node records traces. It shows no prompts and no generated text. How connections are served, and how
many, is http_server.py's to say.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app

from fluxion_core.config.addresses import Address
from fluxion_core.errors import ConfigError, FluxionError
from fluxion_core.machine.threads import start_thread
from fluxion_core.observe.log import event
from services.http_server import Application, HttpServer
from services.metrics import NodeMetrics

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

_log = logging.getLogger(__name__)

MAX_TRACE_STEPS = 10_000
MAX_TRACE_SECONDS = 60.0
ANSWER_SECONDS = 2 * MAX_TRACE_SECONDS
"""For a connection in all: a trace that is recorded, then sent."""
TRACE_PAUSE_SECONDS = 0.001
"""Between pieces of a trace's file."""

OK = "200 OK"


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
        self._server: HttpServer | None = None
        self._metrics = metrics
        if not listen:
            return
        registry = CollectorRegistry(auto_describe=False)
        registry.register(metrics)
        ProcessCollector(registry=registry)
        try:
            address = Address.parse(listen, may_choose_port=True)
            application = _application(registry, metrics)
            self._server = HttpServer(address, application, answer_seconds=ANSWER_SECONDS)
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
