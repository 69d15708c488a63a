"""Metrics of a decode node: what they are, what counts them, and how a scrape reads them.

Requests and hand-offs add to RequestCounters on the event loop, in plain numbers; the engine and
the store keep counters of their own. A scrape takes copies of all of these: nothing that makes
tokens waits for it. GPU metrics are exported only where the engine has a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fluxion_core.geometry import BLOCK_SIZES
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.observe.device_usage import DeviceUsage
from fluxion_core.observe.metrics import MetricDefinition, PlainHistogram
from fluxion_core.pool.cpu_pool import CpuPool
from services.decode.admission import Admission
from services.decode.engine import DecodeEngine, EngineStatistics
from services.decode.read_totals import ReadTotals
from services.gpu_metrics import device_families
from services.metrics import SECONDS_BOUNDS, USUAL_ENDS, outcome_of

INTER_TOKEN_BOUNDS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1),
    *(0.125, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 10),
)
"""Upper bounds of the time from one token to the next, s."""

REQUESTS = MetricDefinition(
    "fluxion_requests_total",
    "counter",
    "requests",
    "Generate requests that ended, by outcome (finished, cancelled, failed) and gRPC status.",
    ("outcome", "status"),
)
REQUESTS_RUNNING = MetricDefinition(
    "fluxion_requests_running",
    "gauge",
    "requests",
    "Requests that hold memory: prefill and decode.",
)
REQUESTS_WAITING = MetricDefinition(
    "fluxion_requests_waiting", "gauge", "requests", "Requests that wait for memory or a place."
)
QUEUE_OLDEST = MetricDefinition(
    "fluxion_queue_oldest_wait_seconds",
    "gauge",
    "seconds",
    "How long the first request of the queue has waited; 0 if nobody waits.",
)
QUEUE_SECONDS = MetricDefinition(
    "fluxion_queue_seconds", "histogram", "seconds", "From a request's arrival to its admission."
)
TIME_TO_FIRST_TOKEN = MetricDefinition(
    "fluxion_time_to_first_token_seconds",
    "histogram",
    "seconds",
    "From a request's arrival to its first token.",
)
INTER_TOKEN = MetricDefinition(
    "fluxion_inter_token_seconds",
    "histogram",
    "seconds",
    "From one token of a request to its next, as they leave for the client.",
)
REQUEST_SECONDS = MetricDefinition(
    "fluxion_request_seconds",
    "histogram",
    "seconds",
    "From a request's arrival to its end, finished requests only.",
)
PROMPT_TOKENS = MetricDefinition(
    "fluxion_prompt_tokens_total",
    "counter",
    "tokens",
    "Prompt tokens of admitted requests, by source: computed by a prefill node, local (computed on "
    "the decode node), or cached in the store.",
    ("source",),
)
PLACEMENTS = MetricDefinition(
    "fluxion_prompt_placements_total",
    "counter",
    "prompts",
    "Admitted prompts by who computes what is missing of them (decode or prefill), and why: the "
    "smaller estimated cost, the operator's setting, no prefill node configured (no_prefill_node), "
    "or no hand-off seen yet (untried).",
    ("computed_by", "reason"),
)
GENERATED_TOKENS = MetricDefinition(
    "fluxion_generated_tokens_total", "counter", "tokens", "Tokens sent to clients."
)
STORE_CAPACITY = MetricDefinition(
    "fluxion_store_capacity_bytes", "gauge", "bytes", "Host memory of the KV store."
)
STORE_BYTES = MetricDefinition(
    "fluxion_store_bytes",
    "gauge",
    "bytes",
    "Host memory by state (free, reserved, used, cached); they add up to the capacity.",
    ("state",),
)
STORE_SHARED = MetricDefinition(
    "fluxion_store_shared_bytes", "gauge", "bytes", "Slabs that more than one sequence holds."
)
STORE_SEQUENCES = MetricDefinition(
    "fluxion_store_sequences", "gauge", "sequences", "Sequences that hold part of the store."
)
PREFILL_ANSWERING = MetricDefinition(
    "fluxion_prefill_nodes_answering",
    "gauge",
    "nodes",
    "Prefill nodes that answered this node's last look and do not drain; 0 without any configured.",
)
HANDOFFS = MetricDefinition(
    "fluxion_handoffs_total",
    "counter",
    "hand-offs",
    "KV hand-offs that were committed, by prefill node.",
    ("node",),
)
HANDOFF_BYTES = MetricDefinition(
    "fluxion_handoff_bytes_total",
    "counter",
    "bytes",
    "KV payload of committed hand-offs, by prefill node.",
    ("node",),
)
HANDOFF_SECONDS = MetricDefinition(
    "fluxion_handoff_seconds",
    "histogram",
    "seconds",
    "From the first KV frame of a hand-off to its commit.",
)
HANDOFF_FAILURES = MetricDefinition(
    "fluxion_handoff_failures_total",
    "counter",
    "attempts",
    "Hand-off attempts that failed, by gRPC status; another node may have been tried after.",
    ("reason",),
)
STEPS = MetricDefinition("fluxion_decode_steps_total", "counter", "steps", "Decode steps.")
STEP_TOKENS = MetricDefinition(
    "fluxion_decode_tokens_total",
    "counter",
    "tokens",
    "Tokens that decode steps made; by the steps, the sequences decoded together.",
)
ENGINE_BUSY = MetricDefinition(
    "fluxion_engine_busy_seconds_total", "counter", "seconds", "Engine thread in decode steps."
)
ENGINE_IDLE = MetricDefinition(
    "fluxion_engine_idle_seconds_total", "counter", "seconds", "Engine thread without a sequence."
)
SCANNED = MetricDefinition(
    "fluxion_scanned_bytes_total", "counter", "bytes", "Digests read to choose blocks."
)
ATTENDED = MetricDefinition(
    "fluxion_attended_bytes_total",
    "counter",
    "bytes",
    "K and V read of retrieval regions: unions of what the heads of each group chose.",
)
REGION = MetricDefinition(
    "fluxion_region_bytes_total", "counter", "bytes", "K and V that policy exact would have read."
)
STREAMING_HEADS = MetricDefinition(
    "fluxion_streaming_heads_total",
    "counter",
    "heads",
    "Heads that read nothing of a region, over all layers and steps.",
)
PLANNED_HEADS = MetricDefinition(
    "fluxion_planned_heads_total",
    "counter",
    "heads",
    "All heads where there was a region, over all layers and steps.",
)
GROUPS = MetricDefinition(
    "fluxion_groups_total",
    "counter",
    "groups",
    "GQA groups by what they read of a region: nothing, everything, or blocks of 16 to 128 tokens.",
    ("reads",),
)
POOL_THREADS = MetricDefinition(
    "fluxion_pool_threads",
    "gauge",
    "threads",
    "Threads of the CPU pool that work on a round of attention, the engine's own included.",
)
POOL_STALLS = MetricDefinition(
    "fluxion_pool_stalls_total",
    "counter",
    "stalls",
    "Times that a thread of the CPU pool was found without its CPU while the others waited for it.",
)
POOL_LEFT_OUT = MetricDefinition(
    "fluxion_pool_left_out_cpus",
    "gauge",
    "cpus",
    "CPUs that the CPU pool does not use now, because its threads were kept waiting there.",
)
TASKS = MetricDefinition(
    "fluxion_tasks_total",
    "counter",
    "tasks",
    "Attention tasks over retrieval regions, by the device that did them.",
    ("device",),
)

DECODE_DEFINITIONS = (
    *(REQUESTS, REQUESTS_RUNNING, REQUESTS_WAITING, QUEUE_OLDEST, QUEUE_SECONDS),
    *(
        TIME_TO_FIRST_TOKEN,
        INTER_TOKEN,
        REQUEST_SECONDS,
        PROMPT_TOKENS,
        PLACEMENTS,
        GENERATED_TOKENS,
    ),
    *(STORE_CAPACITY, STORE_BYTES, STORE_SHARED, STORE_SEQUENCES),
    PREFILL_ANSWERING,
    *(HANDOFFS, HANDOFF_BYTES, HANDOFF_SECONDS, HANDOFF_FAILURES),
    *(STEPS, STEP_TOKENS, ENGINE_BUSY, ENGINE_IDLE),
    *(SCANNED, ATTENDED, REGION, STREAMING_HEADS, PLANNED_HEADS, GROUPS, TASKS),
    *(POOL_THREADS, POOL_STALLS, POOL_LEFT_OUT),
)


@dataclass
class RequestCounters:
    """What requests and hand-offs add up to. Written on the event loop only."""

    ended: Counter[tuple[str, ...]] = field(
        default_factory=lambda: Counter(dict.fromkeys(USUAL_ENDS, 0))
    )
    queue_seconds: PlainHistogram = field(default_factory=lambda: PlainHistogram(SECONDS_BOUNDS))
    first_token_seconds: PlainHistogram = field(
        default_factory=lambda: PlainHistogram(SECONDS_BOUNDS)
    )
    inter_token_seconds: PlainHistogram = field(
        default_factory=lambda: PlainHistogram(INTER_TOKEN_BOUNDS)
    )
    request_seconds: PlainHistogram = field(default_factory=lambda: PlainHistogram(SECONDS_BOUNDS))
    prompt_tokens: Counter[tuple[str, ...]] = field(
        default_factory=lambda: Counter({("computed",): 0, ("local",): 0, ("cached",): 0})
    )
    placements: Counter[tuple[str, ...]] = field(
        default_factory=lambda: Counter({("decode", "cost"): 0, ("prefill", "cost"): 0})
    )
    """By who computes what is missing of a prompt, and why; see placement.py."""
    generated_tokens: int = 0
    prefill_nodes_answering: int = 0
    handoffs: Counter[tuple[str, ...]] = field(default_factory=Counter)
    handoff_bytes: Counter[tuple[str, ...]] = field(default_factory=Counter)
    handoff_seconds: PlainHistogram = field(default_factory=lambda: PlainHistogram(SECONDS_BOUNDS))
    handoff_failures: Counter[tuple[str, ...]] = field(
        default_factory=lambda: Counter({("UNAVAILABLE",): 0})
    )

    def request_ended(self, error: BaseException | None, seconds: float) -> None:
        """A Generate request is over."""
        self.ended[outcome_of(error)] += 1
        if error is None:
            self.request_seconds.observe(seconds)

    def admitted(
        self, *, prompt_tokens: int, cached_tokens: int, is_local: bool, seconds: float
    ) -> None:
        """A request got its memory, `seconds` after it came; is_local: this node computes it."""
        self.queue_seconds.observe(seconds)
        source = "local" if is_local else "computed"
        self.prompt_tokens[source,] += prompt_tokens - cached_tokens
        self.prompt_tokens["cached",] += cached_tokens

    def handed_off(self, node: str, *, num_bytes: int, seconds: float) -> None:
        """A prefill node's KV was committed."""
        self.handoffs[node,] += 1
        self.handoff_bytes[node,] += num_bytes
        self.handoff_seconds.observe(seconds)

    def handoff_failed(self, error: BaseException) -> None:
        """A hand-off attempt came to nothing."""
        self.handoff_failures[outcome_of(error)[1],] += 1


class DecodeCollector(Collector):
    """Reads the counters of a decode node for a scrape.

    Args:
        counters: of requests.
        admission: for the queue.
        store: for host memory.
        engine: for steps, reads and the GPU.
        pool: the CPU threads that attend.
    """

    def __init__(
        self,
        counters: RequestCounters,
        admission: Admission,
        store: HostKvStore,
        engine: DecodeEngine,
        pool: CpuPool,
    ) -> None:
        self._pool = pool
        self._counters = counters
        self._admission = admission
        self._store = store
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """All families, as they are now."""
        yield from self._requests()
        yield from self._held_memory()
        yield from self.collect_engine()
        yield POOL_THREADS.render_value(self._pool.num_threads)
        yield POOL_STALLS.render_value(self._pool.stalls)
        yield POOL_LEFT_OUT.render_value(self._pool.num_left_out)

    def collect_engine(self) -> Iterator[Metric]:
        """What the engine counts, and its GPU if it has one."""
        statistics = self._engine.statistics()
        yield from _steps(statistics)
        if statistics.device is not None:
            yield from device_families(statistics.device)

    def _requests(self) -> Iterator[Metric]:
        counters, queue = self._counters, self._admission.statistics()
        yield REQUESTS.render(dict(counters.ended))
        yield REQUESTS_RUNNING.render_value(queue.admitted)
        yield REQUESTS_WAITING.render_value(queue.waiting)
        yield QUEUE_OLDEST.render_value(queue.oldest_wait_seconds)
        for definition, histogram in (
            (QUEUE_SECONDS, counters.queue_seconds),
            (TIME_TO_FIRST_TOKEN, counters.first_token_seconds),
            (INTER_TOKEN, counters.inter_token_seconds),
            (REQUEST_SECONDS, counters.request_seconds),
            (HANDOFF_SECONDS, counters.handoff_seconds),
        ):
            yield definition.render_histogram({(): histogram})
        yield PROMPT_TOKENS.render(dict(counters.prompt_tokens))
        yield PLACEMENTS.render(dict(counters.placements))
        yield GENERATED_TOKENS.render_value(counters.generated_tokens)
        yield PREFILL_ANSWERING.render_value(counters.prefill_nodes_answering)
        yield HANDOFFS.render(dict(counters.handoffs))
        yield HANDOFF_BYTES.render(dict(counters.handoff_bytes))
        yield HANDOFF_FAILURES.render(dict(counters.handoff_failures))

    def _held_memory(self) -> Iterator[Metric]:
        store = self._store.statistics()
        yield STORE_CAPACITY.render_value(store.capacity_bytes)
        yield STORE_BYTES.render(
            {
                ("free",): store.free_bytes,
                ("reserved",): store.reserved_bytes,
                ("used",): store.used_bytes,
                ("cached",): store.cached_bytes,
            }
        )
        yield STORE_SHARED.render_value(store.shared_slabs * self._store.slab_stride_bytes)
        yield STORE_SEQUENCES.render_value(store.sequences)


def _steps(statistics: EngineStatistics) -> Iterator[Metric]:
    reads = statistics.reads
    for definition, value in (
        (STEPS, statistics.steps),
        (STEP_TOKENS, statistics.tokens),
        (ENGINE_BUSY, statistics.busy_seconds),
        (ENGINE_IDLE, statistics.idle_seconds),
        (SCANNED, reads.scanned_bytes),
        (ATTENDED, reads.attended_bytes),
        (REGION, reads.region_bytes),
        (STREAMING_HEADS, reads.streaming_heads),
        (PLANNED_HEADS, reads.planned_heads),
    ):
        yield definition.render_value(value)
    groups: dict[tuple[str, ...], float] = {
        ("nothing",): reads.groups_nothing,
        ("everything",): reads.groups_everything,
    }
    for size, count in zip(BLOCK_SIZES, reads.groups_of_size, strict=True):
        groups[str(size),] = count
    yield GROUPS.render(groups)
    yield TASKS.render(_tasks(reads, statistics.device))


def _tasks(reads: ReadTotals, device: DeviceUsage | None) -> dict[tuple[str, ...], float]:
    """Without a GPU, the CPU pool has done every group that read something."""
    if device is not None:
        return {(name,): count for name, count in device.tasks_by_device.items()}
    return {("cpu",): sum(reads.groups_of_size) + reads.groups_everything}
