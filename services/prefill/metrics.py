"""Metrics of a prefill node: what they are, what counts them, and how a scrape reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fluxion_core.config.carriers import Carrier
from fluxion_core.observe.metrics import MetricDefinition, PlainHistogram
from services.gpu_metrics import device_families
from services.metrics import SECONDS_BOUNDS, USUAL_ENDS, outcome_of
from services.prefill.data_plane import DataPlane
from services.prefill.engine import PrefillEngine
from services.prefill.prompt import Prompt

PROMPTS = MetricDefinition(
    "fluxion_prefill_prompts_total",
    "counter",
    "prompts",
    "Hand-offs that ended, by outcome (finished, cancelled, failed) and gRPC status.",
    ("outcome", "status"),
)
RUNNING = MetricDefinition(
    "fluxion_prefill_prompts_running",
    "gauge",
    "prompts",
    "Prompts that have begun and do not pause; one of them is computed at a time.",
)
PAUSED = MetricDefinition(
    "fluxion_prefill_prompts_paused",
    "gauge",
    "prompts",
    "Prompts that have begun and pause, because their decode node does not take their KV.",
)
WAITING = MetricDefinition(
    "fluxion_prefill_prompts_waiting", "gauge", "prompts", "Prompts that have not begun."
)
PENDING_TOKENS = MetricDefinition(
    "fluxion_prefill_pending_tokens", "gauge", "tokens", "Prompt tokens still to be computed."
)
TOKENS = MetricDefinition(
    "fluxion_prefill_tokens_total", "counter", "tokens", "Prompt tokens computed."
)
BUSY = MetricDefinition(
    "fluxion_prefill_busy_seconds_total", "counter", "seconds", "Engine thread computing prompts."
)
KV_BYTES = MetricDefinition(
    "fluxion_prefill_kv_bytes_total", "counter", "bytes", "KV payload made for decode nodes."
)
HANDOFFS = MetricDefinition(
    "fluxion_prefill_handoffs_total",
    "counter",
    "hand-offs",
    "Hand-offs whose prompts were begun, by the way of their KV: shared_memory, sockets or grpc.",
    ("way",),
)
TAKEN_BYTES = MetricDefinition(
    "fluxion_prefill_taken_bytes_total",
    "counter",
    "bytes",
    "KV payload that left, by the way that it took; counted when a hand-off ends.",
    ("way",),
)
REFUSED_CONNECTIONS = MetricDefinition(
    "fluxion_prefill_refused_connections_total",
    "counter",
    "connections",
    "Connections for KV that were closed at once. By reason: hello (it did not begin as one), late "
    "(with nothing, for 5 s), crowded (it gave way to a newer one that had said nothing either), "
    "ticket (of no call here), second (made before), user (another one of this machine), system.",
    ("reason",),
)
QUEUE_SECONDS = MetricDefinition(
    "fluxion_prefill_queue_seconds",
    "histogram",
    "seconds",
    "From a prompt's arrival to its first chunk, finished prompts only.",
)
PREFILL_SECONDS = MetricDefinition(
    "fluxion_prefill_seconds",
    "histogram",
    "seconds",
    "Computing a prompt, its pauses and others' chunks not counted, finished prompts only.",
)

PREFILL_DEFINITIONS = (
    *(PROMPTS, RUNNING, PAUSED, WAITING, PENDING_TOKENS, TOKENS, BUSY, KV_BYTES),
    *(HANDOFFS, TAKEN_BYTES, REFUSED_CONNECTIONS, QUEUE_SECONDS, PREFILL_SECONDS),
)


@dataclass
class PromptCounters:
    """Sums over hand-offs. Written on the event loop only."""

    ended: Counter[tuple[str, ...]] = field(
        default_factory=lambda: Counter(dict.fromkeys(USUAL_ENDS, 0))
    )
    handoffs: Counter[tuple[str, ...]] = field(default_factory=lambda: Counter(_each_way()))
    taken_bytes: Counter[tuple[str, ...]] = field(default_factory=lambda: Counter(_each_way()))
    queue_seconds: PlainHistogram = field(default_factory=lambda: PlainHistogram(SECONDS_BOUNDS))
    prefill_seconds: PlainHistogram = field(default_factory=lambda: PlainHistogram(SECONDS_BOUNDS))

    def prompt_ended(self, error: BaseException | None, prompt: Prompt | None) -> None:
        """Count the end of a hand-off; without a prompt it was refused."""
        self.ended[outcome_of(error)] += 1
        if error is None and prompt is not None:
            self.queue_seconds.observe(prompt.queue_seconds)
            self.prefill_seconds.observe(prompt.prefill_seconds)

    def kv_left(self, way: Carrier, num_bytes: int) -> None:
        """Count the KV of a hand-off that has ended."""
        self.handoffs[way,] += 1
        self.taken_bytes[way,] += num_bytes


def _each_way() -> dict[tuple[str, ...], int]:
    return {(way,): 0 for way in Carrier}


class PrefillCollector(Collector):
    """Reads the counters of a prefill node for a scrape."""

    def __init__(self, counters: PromptCounters, engine: PrefillEngine, plane: DataPlane) -> None:
        self._counters = counters
        self._engine = engine
        self._plane = plane

    def collect(self) -> Iterator[Metric]:
        """All families, as they are now."""
        load, statistics = self._engine.load(), self._engine.statistics()
        yield PROMPTS.render(dict(self._counters.ended))
        yield RUNNING.render_value(load.running_prompts)
        yield PAUSED.render_value(load.paused_prompts)
        yield WAITING.render_value(load.waiting_prompts)
        yield PENDING_TOKENS.render_value(load.pending_tokens)
        yield TOKENS.render_value(statistics.tokens)
        yield BUSY.render_value(statistics.busy_seconds)
        yield KV_BYTES.render_value(statistics.payload_bytes)
        yield HANDOFFS.render(dict(self._counters.handoffs))
        yield TAKEN_BYTES.render(dict(self._counters.taken_bytes))
        yield REFUSED_CONNECTIONS.render(self._plane.refusals)
        yield QUEUE_SECONDS.render_histogram({(): self._counters.queue_seconds})
        yield PREFILL_SECONDS.render_histogram({(): self._counters.prefill_seconds})
        if statistics.device is not None:
            yield from device_families(statistics.device)
