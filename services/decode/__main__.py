"""Start a decode node: `python -m services.decode --help`."""

from __future__ import annotations

import asyncio
import logging
import sys
from contextlib import AsyncExitStack
from types import ModuleType

from fluxion_core.observe.log import event
from fluxion_core.wire.channel import check_client
from fluxion_core.wire.server import NodeServer
from fluxion_proto.v1 import generate_pb2_grpc
from services.decode.assembly import LoadedParts, ServingParts, load_parts, make_serving
from services.decode.config import DecodeSettings
from services.decode.prefill_nodes import PrefillNodes
from services.decode.prefill_watch import PrefillWatch
from services.decode.service import GENERATION_SERVICE, GenerationService
from services.decode.watchdog import StepWatchdog
from services.gpu_metrics import nvml_collectors
from services.loading import EndedWhileLoadingError
from services.metrics import NodeMetrics
from services.metrics_endpoint import MetricsEndpoint
from services.node import DeviceFailure, run_node
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
        # Closed from the last to the first: no calls, then no steps, then no threads that take KV,
        # no channels, then the pinned memory; the rest goes with the process.
        closing.callback(_log.info, event("stopped"))
        closing.callback(endpoint.close)
        closing.push_async_callback(server.stop, 0)
        loaded = await load_parts(settings, ending)
        closing.push_async_callback(asyncio.to_thread, loaded.step.close)
        if ending.is_set():
            raise EndedWhileLoadingError
        nodes = PrefillNodes(settings.prefill.addresses, settings.prefill.client)
        closing.push_async_callback(nodes.close)
        serving = make_serving(settings, loaded, nodes, server, on_failure=failure.tell)
        closing.callback(serving.plane.close)
        export(metrics, loaded, serving)
        serving.engine.start()
        closing.callback(StepWatchdog(serving.engine, settings.engine.stuck_step_seconds).close)
        closing.push_async_callback(asyncio.to_thread, serving.engine.stop)
        closing.push_async_callback(server.stop, 0)
        service = add_services(server, settings, vllm_api, loaded, serving)
        readiness = make_readiness(settings, server, metrics, address, loaded, serving)
        watch = PrefillWatch(
            nodes,
            computes_prompts=settings.engine.local_prefill_tokens != 0,
            tell=readiness.tell,
            counters=serving.counters,
        )
        await readiness.loaded(watch.why_not_at_first)
        watching = asyncio.ensure_future(watch.run())
        closing.callback(watching.cancel)
        await ending.wait()
        _log.info(event("draining", grace_seconds=settings.server.grace_seconds))
        service.is_draining = True
        serving.admission.drain()
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
    loaded: LoadedParts,
    serving: ServingParts,
) -> GenerationService:
    """Register what the node serves; returns our own service."""
    service = GenerationService(
        serving.generation,
        loaded.model,
        loaded.store,
        serving.admission,
        serving.engine,
        planning=loaded.planning,
        callers=server.callers,
    )
    generate_pb2_grpc.add_GenerationServicer_to_server(service, server)
    if vllm_api is not None:
        vllm_api.add_to_server(
            server,
            serving.generation,
            loaded.model,
            loaded.store,
            serving.admission,
            max_running=settings.engine.max_running_sequences,
        )
    return service


def export(metrics: NodeMetrics, loaded: LoadedParts, serving: ServingParts) -> None:
    """Have the endpoint show the parts' figures and traces."""
    device = loaded.model.loaded.decoder.embedding.device
    metrics.take_trace = serving.trace.take
    metrics.data_plane_cpu_seconds = serving.plane.cpu_seconds
    metrics.loaded(
        loaded.model.loaded.name, str(device), serving.collector, *nvml_collectors(device)
    )


def make_readiness(
    settings: DecodeSettings,
    server: NodeServer,
    metrics: NodeMetrics,
    address: str,
    loaded: LoadedParts,
    serving: ServingParts,
) -> Readiness:
    """The node's readiness, and what its log line says of the node."""
    return Readiness(
        server,
        metrics,
        address=address,
        model=loaded.model.loaded.name,
        device=loaded.model.loaded.decoder.embedding.device,
        host_kv_bytes=loaded.store.statistics().capacity_bytes,
        policy=str(loaded.planning.default_policy),
        prefill=",".join(settings.prefill.addresses) or "none",
        ways=",".join(serving.plane.ways),
    )


if __name__ == "__main__":
    sys.exit(run_node("decode", DecodeSettings, sys.argv[1:], serve))
