"""Start a prefill node: `python -m services.prefill --help`."""

from __future__ import annotations

import asyncio
import logging
import sys
from functools import partial

from fluxion_core.observe.log import event
from fluxion_core.wire.server import NodeServer
from fluxion_proto.v1 import handoff_pb2_grpc
from services.gpu_metrics import nvml_collectors
from services.loading import load
from services.metrics import NodeMetrics
from services.metrics_endpoint import MetricsEndpoint
from services.node import DeviceFailure, NodeModel, load_node_model, run_node
from services.prefill.config import (
    CPU_CHUNK_TOKENS,
    CPU_OUTGOING_BYTES,
    GPU_CHUNK_TOKENS,
    GPU_OUTGOING_BYTES,
    PrefillNodeSettings,
)
from services.prefill.data_plane import DataPlane
from services.prefill.engine import PrefillEngine
from services.prefill.metrics import PrefillCollector, PromptCounters
from services.prefill.service import (
    HANDOFF_SERVICE,
    PREFILL_NODE_SERVICE,
    HandoffService,
    PrefillNodeService,
)
from services.readiness import Readiness

_log = logging.getLogger(__name__)


async def serve(settings: PrefillNodeSettings, ending: asyncio.Event) -> None:
    """Load the model, answer hand-offs until `ending`, then drain."""
    server = NodeServer(settings.server, HANDOFF_SERVICE, reflected=[PREFILL_NODE_SERVICE])
    metrics = NodeMetrics("prefill", lambda: server.unread_calls)
    endpoint = MetricsEndpoint(settings.server.metrics_listen, metrics)
    address = await server.start()
    plane = DataPlane(settings)
    metrics.data_plane_cpu_seconds = plane.cpu_seconds
    failure = DeviceFailure(ending)
    engine: PrefillEngine | None = None
    try:
        plane.start()
        _log.info(
            event(
                "listening",
                address=address,
                ways=",".join(plane.ways),
                data_address=plane.data_address,
            )
        )
        model = await load(partial(load_node_model, settings.model), ending)
        engine = make_engine(settings, model, failure)
        await load(engine.warm_up, ending)
        engine.start()
        counters = PromptCounters()
        device = model.loaded.decoder.embedding.device
        metrics.loaded(
            model.loaded.name,
            str(device),
            PrefillCollector(counters, engine, plane),
            *nvml_collectors(device),
        )
        plane.loaded(model.geometry())
        node = add_services(server, model, engine, plane, counters)
        readiness = Readiness(
            server,
            metrics,
            address=address,
            model=model.loaded.name,
            chunk_tokens=engine.chunk_tokens,
        )
        await readiness.loaded()
        await ending.wait()
        _log.info(event("draining", grace_seconds=settings.server.grace_seconds))
        node.is_draining = True
        await readiness.drain()
        await server.stop(settings.server.grace_seconds)
        if failure.error is not None:
            raise failure.error
    finally:
        await server.stop(0)
        if engine is not None:
            engine.stop()
        await plane.stop()
        endpoint.close()
        _log.info(event("stopped"))


def make_engine(
    settings: PrefillNodeSettings, model: NodeModel, failure: DeviceFailure
) -> PrefillEngine:
    """The engine that computes this node's prompts; it tells `failure` if the device fails."""
    return PrefillEngine(
        model.loaded.decoder,
        model.geometry(),
        chunk_tokens=chunk_tokens(settings, model),
        max_running=settings.engine.max_running_prompts,
        max_waiting=settings.engine.max_waiting_prompts,
        running_kv_bytes=settings.engine.running_kv_bytes,
        outgoing_bytes=outgoing_bytes(settings, model),
        on_failure=failure.tell,
    )


def add_services(
    server: NodeServer,
    model: NodeModel,
    engine: PrefillEngine,
    plane: DataPlane,
    counters: PromptCounters,
) -> PrefillNodeService:
    """Register both services; returns the one that says whether the node drains."""
    handoff = HandoffService(
        engine,
        plane,
        model.layout,
        vocab_size=model.loaded.config.vocab_size,
        context_tokens=model.loaded.config.context_tokens,
        counters=counters,
        callers=server.callers,
    )
    node = PrefillNodeService(engine, model.layout)
    server.add_generic_rpc_handlers((handoff.generic_handler(),))
    handoff_pb2_grpc.add_PrefillNodeServicer_to_server(node, server)
    return node


def chunk_tokens(settings: PrefillNodeSettings, model: NodeModel) -> int:
    """Tokens of a chunk: what the settings say, else what suits the model's device."""
    default = GPU_CHUNK_TOKENS if _is_on_gpu(model) else CPU_CHUNK_TOKENS
    return settings.engine.chunk_tokens or default


def outgoing_bytes(settings: PrefillNodeSettings, model: NodeModel) -> int:
    """KV of a prompt that may wait: what the settings say, else what suits the model's device."""
    default = GPU_OUTGOING_BYTES if _is_on_gpu(model) else CPU_OUTGOING_BYTES
    given = settings.engine.outgoing_bytes
    return default if given is None else given


def _is_on_gpu(model: NodeModel) -> bool:
    return model.loaded.decoder.embedding.device.type == "cuda"


if __name__ == "__main__":
    sys.exit(run_node("prefill", PrefillNodeSettings, sys.argv[1:], serve))
