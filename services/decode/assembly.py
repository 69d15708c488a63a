"""The parts of a decode node, each made from the settings and from those before it.

What takes long, or memory, is loaded first: `load_parts`. What serves requests with it is made
then, and starts nothing yet: `make_serving`. When which is started and closed, __main__.py says.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fluxion_core.decode.bodies import step_for
from fluxion_core.decode.step import DecodeStep
from fluxion_core.errors import DeviceError, RequestCancelledError
from fluxion_core.geometry import WindowSpec
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.observe.log import event
from fluxion_core.observe.trace import TraceRecorder
from fluxion_core.pool.thread_choice import make_pool
from fluxion_core.wire.client_limits import ClientLimits
from fluxion_core.wire.server import NodeServer
from services.decode.admission import Admission
from services.decode.config import DecodeSettings
from services.decode.data_plane import DataPlane
from services.decode.engine import DecodeEngine
from services.decode.generation import Generation
from services.decode.head_errors import HeadErrors
from services.decode.kv_ingest import KvIngest
from services.decode.metrics import DecodeCollector
from services.decode.placement import Placement
from services.decode.planning import Planning, make_planning
from services.decode.prefill_nodes import PrefillNodes
from services.decode.prompt_costs import ModelCosts, PromptCosts
from services.decode.prompt_queue import PromptQueue
from services.decode.prompt_reader import PromptReader
from services.decode.request_counters import RequestCounters
from services.loading import EndedWhileLoadingError, load
from services.node import NodeModel, load_node_model

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedParts:
    """The parts that are loaded: the model, and what runs its steps."""

    model: NodeModel
    planning: Planning
    store: HostKvStore
    step: DecodeStep
    """To be closed, which unpins the store's memory."""


@dataclass(frozen=True)
class ServingParts:
    """The parts that serve requests."""

    engine: DecodeEngine
    """To be started, and to be stopped before the step is closed."""
    admission: Admission
    generation: Generation
    counters: RequestCounters
    trace: TraceRecorder
    collector: DecodeCollector
    plane: DataPlane
    """To be closed once nothing is handed off any more."""


async def load_parts(settings: DecodeSettings, ending: asyncio.Event) -> LoadedParts:
    """Load the model, take the store's memory, and get steps ready.

    Raises:
        EndedWhileLoadingError: the node is to end; nothing is left to close.
    """
    model = await load(partial(load_node_model, settings.model), ending)
    planning = make_planning(
        settings.engine.predictor_weights,
        settings.engine.default_policy,
        model.loaded,
        WindowSpec(settings.store.sink_tokens, settings.store.recent_tokens),
        digest_bits=settings.store.digest_bits,
    )
    store = await load(partial(make_store, settings, model), ending)
    step = await load_step(settings, model, store, planning, ending)
    return LoadedParts(model, planning, store, step)


def make_serving(
    settings: DecodeSettings,
    loaded: LoadedParts,
    nodes: PrefillNodes,
    server: NodeServer,
    *,
    on_failure: Callable[[DeviceError], None],
) -> ServingParts:
    """Make what serves requests; starts nothing.

    Args:
        settings: of the node.
        loaded: the model, its store and its steps.
        nodes: that prompts may be handed to.
        server: whose callers and limits count.
        on_failure: told when the device has failed for good.
    """
    costs = make_costs(loaded.model, loaded.store, loaded.step)
    trace = TraceRecorder(loaded.step.span_source)
    head_errors = HeadErrors(loaded.planning.levels)
    engine = DecodeEngine(
        loaded.step,
        on_failure=on_failure,
        on_chunk=costs.here.learn,
        on_head_errors=head_errors.add,
        trace=trace,
    )
    counters = RequestCounters()
    admission = Admission(
        loaded.store,
        max_running=settings.engine.max_running_sequences,
        max_waiting=settings.engine.max_waiting_requests,
    )
    placement = Placement(
        limit=settings.engine.local_prefill_tokens,
        has_prefill_nodes=bool(nodes),
        costs=costs,
        load=engine.load,
        least_load=nodes.least_load,
        counters=counters,
    )
    plane = make_plane(settings, loaded)
    generation = Generation(
        loaded.model,
        admission,
        make_ingest(settings, loaded.model, nodes, plane, counters, trace),
        engine,
        make_reader(settings, loaded.model, loaded.planning, server.limits),
        placement=placement,
        planning=loaded.planning,
        counters=counters,
        callers=server.callers,
        limits=server.limits,
        share_prefixes=settings.store.share_prefixes,
    )
    collector = DecodeCollector(
        counters, admission, loaded.store, engine, loaded.step.pool, head_errors
    )
    return ServingParts(engine, admission, generation, counters, trace, collector, plane)


def make_plane(settings: DecodeSettings, loaded: LoadedParts) -> DataPlane:
    """The threads that take KV beside its calls, on CPUs that the pool leaves free, if any.

    Raises:
        RuntimeError: no further thread is to be had; see threads.thread_limit.
    """
    return DataPlane(
        settings.handoff,
        settings.prefill.client,
        loaded.store.geometry,
        cpus=loaded.step.pool.spare_cpus,
    )


def make_ingest(
    settings: DecodeSettings,
    model: NodeModel,
    nodes: PrefillNodes,
    plane: DataPlane,
    counters: RequestCounters,
    trace: TraceRecorder,
) -> KvIngest:
    """The ingest that has prompts computed by prefill nodes."""
    return KvIngest(
        nodes,
        model.layout,
        vocab_size=model.loaded.config.vocab_size,
        num_heads=model.loaded.config.num_heads,
        stall_seconds=settings.prefill.stall_seconds,
        plane=plane,
        counters=counters,
        trace=trace,
    )


def make_reader(
    settings: DecodeSettings, model: NodeModel, planning: Planning, limits: ClientLimits
) -> PromptReader:
    """The reader that makes requests of what clients send."""
    return PromptReader(
        model.tokenizer,
        model.loaded.config,
        PromptQueue(max_bytes=settings.engine.max_waiting_text_bytes),
        limits,
        default_max_new_tokens=settings.engine.default_max_new_tokens,
        planning=planning,
    )


def make_store(settings: DecodeSettings, model: NodeModel) -> HostKvStore:
    """The host KV store that the settings ask for.

    Raises:
        CapacityError: the host memory asked for does not hold one slab, or is not there.
        ShapeError: an impossible slab size.
    """
    return HostKvStore(
        model.geometry(settings.store.slab_tokens, settings.store.digest_bits),
        settings.store.host_kv_bytes,
        model_key=model.loaded.revision_hash.encode(),
        populate=settings.store.populate,
    )


def make_costs(model: NodeModel, store: HostKvStore, step: DecodeStep) -> PromptCosts:
    """Estimates of what prompts cost here and on prefill nodes."""
    loaded = model.loaded
    costs = ModelCosts.of(loaded.config, store.geometry, loaded.decoder.embedding.dtype.itemsize)
    return PromptCosts.of(costs, step.pool.num_threads, gathers=step.gathers_prompts)


async def load_step(
    settings: DecodeSettings,
    model: NodeModel,
    store: HostKvStore,
    planning: Planning,
    ending: asyncio.Event,
) -> DecodeStep:
    """`make_step` off the event loop.

    Raises:
        EndedWhileLoadingError: the node is to end.
    """
    make = partial(make_step, settings, model, store, planning, goes_on=lambda: not ending.is_set())
    if model.loaded.decoder.embedding.device.type == "cpu":
        return await load(make, ending)
    # What is pinned must be unpinned before the process ends: not left alone half done.
    try:
        return await asyncio.to_thread(make)
    except RequestCancelledError:
        raise EndedWhileLoadingError from None


def make_step(
    settings: DecodeSettings,
    model: NodeModel,
    store: HostKvStore,
    planning: Planning,
    *,
    goes_on: Callable[[], bool],
) -> DecodeStep:
    """The step that runs where the model is.

    Raises:
        RequestCancelledError: `goes_on` said no before all was pinned; nothing is pinned then.
        ConfigError, ShapeError, CapacityError: see `step_for`.
    """
    pool, choice = make_pool(settings.engine.attention_threads)
    _log.info(event("attention threads", threads=choice.num_threads, measured=choice.measured))
    return step_for(
        model.loaded.decoder,
        store,
        planning.window,
        pool,
        planner=planning.planner,
        lanes=settings.engine.lanes,
        max_rows=settings.engine.max_running_sequences,
        device_kv_bytes=settings.store.device_kv_bytes,
        head_error_one_in=settings.engine.head_error_one_in,
        goes_on=goes_on,
    )
