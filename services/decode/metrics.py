"""Metrics of a decode node, as a scrape reads them.

Requests and hand-offs add to RequestCounters on the event loop; the engine and the store keep
counters of their own. A scrape takes copies of all of these: nothing that makes tokens waits for
it. GPU metrics are exported only where the engine has a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fluxion_core.geometry import BLOCK_SIZES
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.observe.device_usage import DeviceUsage
from fluxion_core.pool.cpu_pool import CpuPool
from services.decode import metric_definitions as metrics
from services.decode.admission import Admission
from services.decode.engine import DecodeEngine, EngineStatistics
from services.decode.head_errors import HeadErrors
from services.decode.read_totals import ReadTotals
from services.decode.request_counters import RequestCounters
from services.gpu_metrics import device_families


class DecodeCollector(Collector):
    """Reads the counters of a decode node for a scrape.

    Args:
        counters: of requests.
        admission: for the queue.
        store: for host memory.
        engine: for steps, reads and the GPU.
        pool: the CPU threads that attend.
        head_errors: what levels lose.
    """

    def __init__(
        self,
        counters: RequestCounters,
        admission: Admission,
        store: HostKvStore,
        engine: DecodeEngine,
        pool: CpuPool,
        head_errors: HeadErrors,
    ) -> None:
        self._pool = pool
        self._head_errors = head_errors
        self._counters = counters
        self._admission = admission
        self._store = store
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """All families, as they are now."""
        yield from self._requests()
        yield from self._held_memory()
        yield from self.collect_engine()
        yield from head_error_families(self._head_errors)
        yield metrics.POOL_THREADS.render_value(self._pool.num_threads)
        yield metrics.POOL_STALLS.render_value(self._pool.stalls)
        yield metrics.POOL_LEFT_OUT.render_value(self._pool.num_left_out)

    def collect_engine(self) -> Iterator[Metric]:
        """Families of the engine, and of its GPU if it has one."""
        statistics = self._engine.statistics()
        yield from _steps(statistics)
        if statistics.device is not None:
            yield from device_families(statistics.device)

    def _requests(self) -> Iterator[Metric]:
        counters, queue = self._counters, self._admission.statistics()
        yield metrics.REQUESTS.render(dict(counters.ended))
        yield metrics.REQUESTS_RUNNING.render_value(queue.admitted)
        yield metrics.REQUESTS_WAITING.render_value(queue.waiting)
        yield metrics.QUEUE_OLDEST.render_value(queue.oldest_wait_seconds)
        for definition, histogram in (
            (metrics.QUEUE_SECONDS, counters.queue_seconds),
            (metrics.TIME_TO_FIRST_TOKEN, counters.first_token_seconds),
            (metrics.INTER_TOKEN, counters.inter_token_seconds),
            (metrics.REQUEST_SECONDS, counters.request_seconds),
            (metrics.HANDOFF_SECONDS, counters.handoff_seconds),
        ):
            yield definition.render_histogram({(): histogram})
        yield metrics.PROMPT_TOKENS.render(dict(counters.prompt_tokens))
        yield metrics.PLACEMENTS.render(dict(counters.placements))
        yield metrics.GENERATED_TOKENS.render_value(counters.generated_tokens)
        yield metrics.PREFILL_ANSWERING.render_value(counters.prefill_nodes_answering)
        yield metrics.HANDOFFS.render(dict(counters.handoffs))
        yield metrics.HANDOFF_BYTES.render(dict(counters.handoff_bytes))
        yield metrics.HANDOFF_FAILURES.render(dict(counters.handoff_failures))

    def _held_memory(self) -> Iterator[Metric]:
        store = self._store.statistics()
        yield metrics.STORE_CAPACITY.render_value(store.capacity_bytes)
        yield metrics.STORE_BYTES.render(
            {
                ("free",): store.free_bytes,
                ("reserved",): store.reserved_bytes,
                ("used",): store.used_bytes,
                ("cached",): store.cached_bytes,
            }
        )
        yield metrics.STORE_SHARED.render_value(store.shared_slabs * self._store.slab_stride_bytes)
        yield metrics.STORE_SEQUENCES.render_value(store.sequences)


def head_error_families(head_errors: HeadErrors) -> Iterator[Metric]:
    """Families of what levels lose; without values for levels that have no samples."""
    levels = head_errors.figures().items()
    errors: dict[tuple[str, ...], float] = {}
    for level, figures in levels:
        errors[level, "true"] = figures.true
        if figures.predicted is not None:
            errors[level, "predicted"] = figures.predicted
    yield metrics.HEAD_ERROR.render(errors)
    yield metrics.HEAD_ERROR_SAMPLES.render({(level,): one.samples for level, one in levels})
    yield metrics.HEAD_ERROR_BYTES.render({(level,): one.read_bytes for level, one in levels})
    yield metrics.HEAD_ERROR_MISSED.render({(level,): one.misses_aim for level, one in levels})


def _steps(statistics: EngineStatistics) -> Iterator[Metric]:
    reads = statistics.reads
    for definition, value in (
        (metrics.STEPS, statistics.steps),
        (metrics.STEP_TOKENS, statistics.tokens),
        (metrics.ENGINE_BUSY, statistics.busy_seconds),
        (metrics.ENGINE_IDLE, statistics.idle_seconds),
        (metrics.SCANNED, reads.scanned_bytes),
        (metrics.ATTENDED, reads.attended_bytes),
        (metrics.REGION, reads.region_bytes),
        (metrics.STREAMING_HEADS, reads.streaming_heads),
        (metrics.PLANNED_HEADS, reads.planned_heads),
    ):
        yield definition.render_value(value)
    groups: dict[tuple[str, ...], float] = {
        ("nothing",): reads.groups_nothing,
        ("everything",): reads.groups_everything,
    }
    for size, count in zip(BLOCK_SIZES, reads.groups_of_size, strict=True):
        groups[str(size),] = count
    yield metrics.GROUPS.render(groups)
    yield metrics.TASKS.render(_tasks(reads, statistics.device))


def _tasks(reads: ReadTotals, device: DeviceUsage | None) -> dict[tuple[str, ...], float]:
    """Without a GPU, the CPU pool has done every group that read something."""
    if device is not None:
        return {(name,): count for name, count in device.tasks_by_device.items()}
    return {("cpu",): sum(reads.groups_of_size) + reads.groups_everything}
