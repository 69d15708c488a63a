"""Metrics that both nodes have, and how requests are classed. Served by metrics_endpoint.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fluxion_core.errors import FluxionError, RequestCancelledError
from fluxion_core.observe.metrics import MetricDefinition
from fluxion_core.observe.trace import Trace
from fluxion_core.observe.trace_events import trace_pieces
from fluxion_core.wire.status import status_of

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
    "fluxion_node_ready",
    "gauge",
    "1",
    "1 while the node is ready, as its health says, else 0.",
    ("kind",),
)
UNREAD_CALLS = MetricDefinition(
    "fluxion_unread_calls_total",
    "counter",
    "calls",
    "Calls ended because their client did not take the answer for server.unread_seconds.",
    ("kind",),
)
DATA_PLANE_CPU = MetricDefinition(
    "fluxion_data_plane_cpu_seconds_total",
    "counter",
    "seconds",
    "CPU time of the threads that move KV beside its calls, over sockets and shared memory.",
    ("kind",),
)
NODE_DEFINITIONS = (NODE_INFO, NODE_READY, UNREAD_CALLS, DATA_PLANE_CPU)

TakeTrace = Callable[[int, float], Trace]
"""Records that many steps, at most for so many seconds; blocks until then."""


def outcome_of(error: BaseException | None) -> tuple[str, str]:
    """Outcome of a request, for labels: finished, cancelled or failed, and its gRPC status."""
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
        unread_calls: counts those that its server has ended.
    """

    def __init__(self, kind: str, unread_calls: Callable[[], int] = lambda: 0) -> None:
        self._kind = kind
        self._unread_calls = unread_calls
        self._info: tuple[str, str] | None = None
        self._collectors: list[Collector] = []
        self.why_not_ready = "the model is being loaded"
        """One sentence; empty while the node is ready. Set by services/readiness.py."""
        self.take_trace: TakeTrace | None = None
        """Set by a node that records traces."""
        self.data_plane_cpu_seconds: Callable[[], float] = float
        """Set by a node that has threads for KV."""

    def describe(self) -> Iterable[Metric]:
        """Nothing: what is exported depends on what the node has loaded."""
        return []

    def loaded(self, model: str, device: str, *collectors: Collector) -> None:
        """The model is there; export these from now on."""
        self._info = (model, device)
        self._collectors = list(collectors)

    def collect(self) -> Iterator[Metric]:
        """Everything, as it is now. Called on the endpoint's threads."""
        yield NODE_READY.render({(self._kind,): float(not self.why_not_ready)})
        yield UNREAD_CALLS.render({(self._kind,): self._unread_calls()})
        yield DATA_PLANE_CPU.render({(self._kind,): self.data_plane_cpu_seconds()})
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
