"""Start a decode node: `python -m services.decode --help`."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from types import ModuleType

from fluxion_core.decode.bodies import step_for
from fluxion_core.decode.step import DecodeStep
from fluxion_core.errors import RequestCancelledError
from fluxion_core.geometry import WindowSpec
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.observe.log import event
from fluxion_core.observe.trace import TraceRecorder
from fluxion_core.pool.thread_choice import make_pool
from fluxion_core.wire.channel import check_client
from fluxion_core.wire.client_limits import ClientLimits
from fluxion_core.wire.server import NodeServer
from fluxion_proto.v1 import generate_pb2_grpc
from services.decode.admission import Admission
from services.decode.config import DecodeSettings
from services.decode.engine import DecodeEngine
from services.decode.generation import Generation
from services.decode.kv_ingest import KvIngest
from services.decode.metrics import DecodeCollector
from services.decode.placement import Placement
from services.decode.planning import Planning, make_planning
from services.decode.prefill_nodes import PrefillNodes
from services.decode.prefill_watch import PrefillWatch
from services.decode.prompt_costs import ModelCosts, PromptCosts
from services.decode.prompt_queue import PromptQueue
from services.decode.prompt_reader import PromptReader
from services.decode.request_counters import RequestCounters
from services.decode.service import GENERATION_SERVICE, GenerationService
from services.decode.watchdog import StepWatchdog
from services.gpu_metrics import nvml_collectors
from services.loading import EndedWhileLoadingError, load
from services.metrics import NodeMetrics
from services.metrics_endpoint import MetricsEndpoint
from services.node import DeviceFailure, NodeModel, load_node_model, run_node
from services.readiness import Readiness

_log = logging.getLogger(__name__)


async def serve(settings: DecodeSettings, ending: asyncio.Event) -> None:
    """Load the model, serve Generate until `ending`, then drain."""
    check_client(settings.prefill.client, settings.prefill.addresses, "prefill.client")
    vllm_api = import_vllm_api()
    server = NodeServer(
        settings.server,
        GENERATION_SERVICE,
        reflected=(GENERATION_SERVICE, *(vllm_api.SERVICES if vllm_api else ())),
    )
    metrics = NodeMetrics("decode", lambda: server.unread_calls)
    endpoint = MetricsEndpoint(settings.server.metrics_listen, metrics)
    address = await server.start()
    _log.info(event("listening", address=address))
    failure = DeviceFailure(ending)
    async with AsyncExitStack() as closing:
        # Closed from the last to the first: no calls, then no steps, then no channels, then the
        # pinned memory; the rest goes with the process.
        closing.callback(_log.info, event("stopped"))
        closing.callback(endpoint.close)
        closing.push_async_callback(server.stop, 0)
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
        closing.push_async_callback(asyncio.to_thread, step.close)
        if ending.is_set():
            raise EndedWhileLoadingError
        nodes = PrefillNodes(settings.prefill.addresses, settings.prefill.client)
        closing.push_async_callback(nodes.close)
        limit = settings.engine.local_prefill_tokens
        costs = make_costs(model, store, step)
        trace = TraceRecorder(step.span_source)
        engine = DecodeEngine(
            step,
            on_failure=failure.tell,
            on_chunk=costs.here.learn,
            trace=trace,
        )
        counters = RequestCounters()
        admission = Admission(
            store,
            max_running=settings.engine.max_running_sequences,
            max_waiting=settings.engine.max_waiting_requests,
        )
        generation = Generation(
            model,
            admission,
            KvIngest(
                nodes,
                model.layout,
                vocab_size=model.loaded.config.vocab_size,
                num_heads=model.loaded.config.num_heads,
                stall_seconds=settings.prefill.stall_seconds,
                counters=counters,
                trace=trace,
            ),
            engine,
            make_reader(settings, model, planning, server.limits),
            placement=Placement(
                limit=limit,
                has_prefill_nodes=bool(nodes),
                costs=costs,
                load=engine.load,
                pending_tokens=nodes.least_pending_tokens,
                counters=counters,
            ),
            planning=planning,
            counters=counters,
            callers=server.callers,
            limits=server.limits,
            share_prefixes=settings.store.share_prefixes,
        )
        device = model.loaded.decoder.embedding.device
        metrics.take_trace = trace.take
        metrics.loaded(
            model.loaded.name,
            str(device),
            DecodeCollector(counters, admission, store, engine, step.pool),
            *nvml_collectors(device),
        )
        engine.start()
        closing.callback(StepWatchdog(engine, settings.engine.stuck_step_seconds).close)
        closing.push_async_callback(asyncio.to_thread, engine.stop)
        closing.push_async_callback(server.stop, 0)
        service = add_services(
            server,
            settings,
            vllm_api,
            generation,
            model,
            store,
            admission,
            engine,
            planning,
        )
        readiness = Readiness(
            server,
            metrics,
            address=address,
            model=model.loaded.name,
            device=device,
            host_kv_bytes=store.statistics().capacity_bytes,
            policy=str(planning.default_policy),
            prefill=",".join(settings.prefill.addresses) or "none",
        )
        watch = PrefillWatch(
            nodes,
            computes_prompts=limit != 0,
            tell=readiness.tell,
            counters=counters,
        )
        await readiness.loaded(watch.why_not_at_first)
        watching = asyncio.ensure_future(watch.run())
        closing.callback(watching.cancel)
        await ending.wait()
        _log.info(event("draining", grace_seconds=settings.server.grace_seconds))
        service.is_draining = True
        admission.drain()
        await readiness.drain()
        await server.stop(settings.server.grace_seconds)
        if failure.error is not None:
            raise failure.error


def import_vllm_api() -> ModuleType | None:
    """The service that gateways speak, if its messages are installed: the extra `gateway`."""
    try:
        from services.decode import vllm_api
    except ModuleNotFoundError as error:
        if error.name != "smg_grpc_proto":
            raise
        _log.info(event("no gateways", reason="smg-grpc-proto is not installed"))
        return None
    return vllm_api


def add_services(
    server: NodeServer,
    settings: DecodeSettings,
    vllm_api: ModuleType | None,
    generation: Generation,
    model: NodeModel,
    store: HostKvStore,
    admission: Admission,
    engine: DecodeEngine,
    planning: Planning,
) -> GenerationService:
    """Register what the node serves; returns our own service."""
    service = GenerationService(
        generation,
        model,
        store,
        admission,
        engine,
        planning=planning,
        callers=server.callers,
    )
    generate_pb2_grpc.add_GenerationServicer_to_server(service, server)
    if vllm_api is not None:
        max_running = settings.engine.max_running_sequences
        vllm_api.add_to_server(server, generation, model, store, admission, max_running=max_running)
    return service


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
    return PromptCosts.of(costs, step.pool.num_threads)


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
        goes_on=goes_on,
    )


if __name__ == "__main__":
    sys.exit(run_node("decode", DecodeSettings, sys.argv[1:], serve))
