"""A node without a model: answers Generate with a script of its own, and health as told.

Run as a program it is a child for `up` and `demo`; imported it serves inside the test's process.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fluxion_core.errors import FluxionError
from fluxion_core.wire.status import sent_metadata
from fluxion_proto.v1 import generate_pb2, generate_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
USAGE = generate_pb2.Usage(
    prompt_tokens=7000,
    cached_tokens=512,
    generated_tokens=3,
    queue_seconds=0.25,
    prefill_seconds=2.5,
    handoff_seconds=0.5,
    decode_seconds=0.75,
    time_to_first_token_seconds=3.0,
    handoff_bytes=1_000_000_000,
    kv_bytes_read_per_token=20e6,
    kv_bytes_in_host_memory=160_000_000,
    kv_reads=generate_pb2.KvReads(
        policy="threshold(0.1)",
        scanned_bytes_per_token=5e6,
        attended_bytes_per_token=15e6,
        share_of_exact=0.125,
        share_of_fixed_estimate=0.5,
        streaming_share=0.25,
        groups_by_block_size=[10, 0, 0, 40],
        groups_nothing=50,
        resident_bytes_per_token=12e6,
    ),
)


PROGRESS = generate_pb2.PromptProgress(
    state=generate_pb2.PROMPT_STATE_PREFILL, prompt_tokens=7000, prompt_tokens_done=3500
)


class FakeGeneration(generate_pb2_grpc.GenerationServicer):
    """Streams `deltas`, one token each, then the last message; or does what it is told."""

    def __init__(self, deltas: tuple[str, ...] = ("The ", "answer", ".")) -> None:
        self.deltas = deltas
        self.requests: list[generate_pb2.GenerateRequest] = []
        self.failure: tuple[grpc.StatusCode, str] | None = None
        self.sends_last_message = True
        self.never_answers = False
        self.called = threading.Event()
        self.was_cancelled = threading.Event()

    def Generate(
        self, request: generate_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[generate_pb2.GenerateResponse]:
        self.requests.append(request)
        self.called.set()
        if self.never_answers:
            context.add_callback(self.was_cancelled.set)
            self.was_cancelled.wait()
        if request.report_progress:
            yield generate_pb2.GenerateResponse(progress=PROGRESS)
        for token_id, delta in enumerate(self.deltas):
            yield generate_pb2.GenerateResponse(text=delta, token_ids=[token_id])
        if self.failure is not None:
            context.set_trailing_metadata([sent_metadata(FluxionError())])
            context.abort(*self.failure)
        if self.sends_last_message:
            yield generate_pb2.GenerateResponse(
                finish_reason=generate_pb2.FINISH_REASON_STOP, usage=USAGE
            )


def serve(
    generation: FakeGeneration, statuses: dict[str, int], address: str
) -> tuple[grpc.Server, int]:
    """Start a server in this process; returns it and its port."""
    server = grpc.server(ThreadPoolExecutor(max_workers=4))
    generate_pb2_grpc.add_GenerationServicer_to_server(generation, server)
    health_servicer = health.HealthServicer()
    for service, status in statuses.items():
        health_servicer.set(service, status)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    port = server.add_insecure_port(address)
    server.start()
    return server, port


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", required=True)
    parser.add_argument("--service", required=True)
    parser.add_argument("--answer", default="An answer.")
    arguments = parser.parse_args()
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    statuses = {"": SERVING, arguments.service: SERVING}
    server, _ = serve(FakeGeneration((arguments.answer,)), statuses, arguments.listen)
    print(f"serving, pid {os.getpid()}")
    stopping.wait()
    server.stop(None).wait()
    print("drained")


if __name__ == "__main__":
    main()
