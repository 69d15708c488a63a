"""Metrics that both nodes have, how requests are classed, and the HTTP endpoint that serves them.

The endpoint is plain HTTP on `server.metrics_listen`, on a thread of its own: GET /metrics for
Prometheus, GET /trace?steps=N for `fluxion trace` where the node records traces. It shows no
prompts and no generated text.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fluxion_core.errors import ConfigError, FluxionError, RequestCancelledError
from fluxion_core.metrics import MetricDefinition
from fluxion_core.telemetry import event
from fluxion_core.trace import Trace
from fluxion_core.trace_events import trace_pieces
from fluxion_core.wire.status import status_of

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

_log = logging.getLogger(__name__)

MAX_TRACE_STEPS = 10_000
MAX_TRACE_SECONDS = 60.0
TRACE_PAUSE_SECONDS = 0.001
"""Between pieces of a trace's file."""

OK = "200 OK"

SECONDS_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
"""Upper bounds of what takes from a moment to minutes: waiting, prefill, whole requests, s."""

USUAL_ENDS = (("finished", "OK"), ("cancelled", "CANCELLED"), ("failed", "INTERNAL"))
"""Outcome and status that are exported from the start, so that ratios of them exist."""

NODE_INFO = MetricDefinition(
    "fluxion_node_info",
    "gauge",
    "1",
    "Always 1: the node's kind, model and device.",
    ("kind", "model", "device"),
)
NODE_READY = MetricDefinition(
    "fluxion_node_ready", "gauge", "1", "1 while the node takes requests, else 0.", ("kind",)
)
NODE_DEFINITIONS = (NODE_INFO, NODE_READY)

TakeTrace = Callable[[int, float], Trace]
"""Records that many steps, at most for so many seconds; blocks until then."""


def outcome_of(error: BaseException | None) -> tuple[str, str]:
    """How a request ended, for labels: finished, cancelled or failed, and its gRPC status."""
    if error is None:
        return "finished", "OK"
    if isinstance(error, asyncio.CancelledError | GeneratorExit | RequestCancelledError):
        return "cancelled", "CANCELLED"
    status = status_of(error) if isinstance(error, FluxionError) else None
    return "failed", status.name if status is not None else "INTERNAL"


class WatchingCollector(Collector):
    """Looks at what it exports between scrapes too, on a thread of its own, until it is closed."""

    def close(self) -> None:
        """Stop looking. Idempotent."""
        raise NotImplementedError


class NodeMetrics(Collector):
    """A node's metrics: whether it is ready, and, once they are there, its own.

    Args:
        kind: "prefill" or "decode".
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._info: tuple[str, str] | None = None
        self._collectors: list[Collector] = []
        self.is_ready = False
        self.take_trace: TakeTrace | None = None
        """Set by a node that records traces."""

    def describe(self) -> Iterable[Metric]:
        """Nothing: what is exported depends on what the node has loaded."""
        return []

    def loaded(self, model: str, device: str, *collectors: Collector) -> None:
        """The model is there; export these from now on."""
        self._info = (model, device)
        self._collectors = list(collectors)

    def collect(self) -> Iterator[Metric]:
        """Everything, as it is now. Called on the endpoint's threads."""
        yield NODE_READY.render({(self._kind,): float(self.is_ready)})
        if self._info is not None:
            yield NODE_INFO.render({(self._kind, *self._info): 1.0})
        for collector in self._collectors:
            yield from collector.collect()

    def trace_pieces(self, trace: Trace) -> Iterator[str]:
        """A trace of this node as JSON, with what is known of the node."""
        model, device = self._info or ("", "")
        return trace_pieces(trace, f"{self._kind} node", {"model": model, "device": device})

    def close(self) -> None:
        """End what collectors do of their own accord. Idempotent."""
        for collector in self._collectors:
            if isinstance(collector, WatchingCollector):
                collector.close()


class MetricsEndpoint:
    """Serves a node's metrics over HTTP until closed.

    Args:
        listen: host:port; empty for no endpoint.
        metrics: what is served.

    Raises:
        ConfigError: the address is malformed or cannot be bound.
    """

    def __init__(self, listen: str, metrics: NodeMetrics) -> None:
        self._server: _Server | None = None
        self._metrics = metrics
        if not listen:
            return
        registry = CollectorRegistry(auto_describe=False)
        registry.register(metrics)
        ProcessCollector(registry=registry)
        host, _, port = listen.rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigError(f"server.metrics_listen {listen!r} is not HOST:PORT")
        try:
            self._server = make_server(
                host.strip("[]"), int(port), _application(registry, metrics), _Server, _Quiet
            )
        except (OSError, OverflowError) as error:
            raise ConfigError(f"server.metrics_listen {listen}: {error}") from None
        threading.Thread(
            target=self._server.serve_forever, name="metrics-endpoint", daemon=True
        ).start()
        _log.info(event("metrics", address=self.address))

    @property
    def address(self) -> str:
        """host:port as bound; empty where there is no endpoint."""
        if self._server is None:
            return ""
        return f"{self._server.server_address[0]!s}:{self._server.server_port}"

    def close(self) -> None:
        """Stop serving and collecting. Idempotent."""
        self._metrics.close()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class _Server(ThreadingMixIn, WSGIServer):
    """One thread a connection: a trace that takes its time does not hold up a scrape."""

    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    """A scrape is not worth a log line."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        del format, args


Application = Callable[["WSGIEnvironment", "StartResponse"], Iterable[bytes]]


def _application(registry: CollectorRegistry, metrics: NodeMetrics) -> Application:
    serve_metrics: Application = make_wsgi_app(registry)

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            return serve_metrics(environ, start_response)
        if path == "/trace":
            status, body = _trace(environ.get("QUERY_STRING", ""), metrics)
        else:
            status, body = "404 Not Found", ["only /metrics and /trace are here\n"]
        kind = "application/json" if status == OK else "text/plain"
        start_response(status, [("Content-Type", f"{kind}; charset=utf-8")])
        return (piece.encode() for piece in body)

    return application


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
