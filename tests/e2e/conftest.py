"""Two real processes, a prefill and a decode node, on free ports of this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fluxion_core.generation.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
READY_SECONDS = 120
LOCAL_TOKENS = 60
"""Of a prompt, computed where it is decoded; what has more of them goes the whole way."""


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Node:
    """One node as a child process."""

    kind: str
    flags: list[str]
    log_path: Path
    address: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")
    process: subprocess.Popen[bytes] | None = None
    prefix: tuple[str, ...] = ()
    """A command that runs the node's in place of itself: nsenter, say."""
    environment: dict[str, str] = field(default_factory=dict)
    """Added to this process's own."""
    ready_seconds: float = READY_SECONDS
    """That it may take to be ready."""

    def start(self) -> Node:
        """Start the process; `wait_ready` waits for it."""
        program = [sys.executable, "-m", f"services.{self.kind}", "--listen", self.address]
        command = [*self.prefix, *program]
        # Before the paths of the tests themselves, which may run where nothing is installed.
        paths = [str(ROOT), str(ROOT / "protos"), os.environ.get("PYTHONPATH", "")]
        path = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        environment = os.environ | path | self.environment
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command + self.flags, cwd=ROOT, env=environment, stdout=log, stderr=log
            )
        return self

    def wait_ready(self) -> Node:
        """Return once the node's health service says SERVING for "" (live)."""
        deadline = time.monotonic() + self.ready_seconds
        with grpc.insecure_channel(self.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while time.monotonic() < deadline:
                assert self.process is not None
                assert self.process.poll() is None, self.log()
                try:
                    answer = health.Check(
                        health_pb2.HealthCheckRequest(service=self.service), timeout=5
                    )
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return self
                except grpc.RpcError:
                    pass
                time.sleep(0.1)
        raise AssertionError(f"{self.kind} was not ready in {self.ready_seconds} s:\n{self.log()}")

    @property
    def service(self) -> str:
        """Name of the service whose health means ready."""
        return "fluxion.v1.Handoff" if self.kind == "prefill" else "fluxion.v1.Generation"

    def log(self) -> str:
        """Everything the node printed."""
        return self.log_path.read_text(errors="replace")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End the process and return its exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(timeout=60)


@dataclass
class Cluster:
    """A decode node and the prefill node that it pulls from."""

    prefill: Node
    decode: Node


@contextmanager
def running_cluster(
    model: Path,
    logs: Path,
    *flags: str,
    decode_flags: Sequence[str] = (),
    prefix: tuple[str, ...] = (),
) -> Iterator[Cluster]:
    """Both nodes with a model, ended on the way out.

    Args:
        model: its file.
        logs: an empty directory.
        flags: for both nodes.
        decode_flags: for the decode node.
        prefix: see Node.
    """
    of_model = ["--model", str(model), *flags]
    prefill = Node("prefill", of_model, logs / "prefill.log", prefix=prefix).start()
    decode = Node(
        "decode",
        [
            *of_model,
            *("--prefill-addresses", prefill.address),
            *("--store.host-kv-bytes", "2GiB"),
            *decode_flags,
        ],
        logs / "decode.log",
        prefix=prefix,
    ).start()
    try:
        yield Cluster(prefill.wait_ready(), decode.wait_ready())
    finally:
        statuses = [decode.stop(), prefill.stop()]
    assert statuses == [0, 0], decode.log() + prefill.log()


def read_document(model: Path) -> list[int]:
    """More than 7,000 tokens of English text, in a model's vocabulary."""
    text = (resources.files("services.cli") / "demo_document.md").read_text("utf-8")
    return Tokenizer.load(model).encode(text * 2)


@pytest.fixture(scope="session")
def cluster(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Both nodes with SmolLM2-135M-Instruct on the CPU, for tests that leave them as they were."""
    with running_cluster(
        smollm2_path,
        tmp_path_factory.mktemp("nodes"),
        *("--device", "cpu", "--model.dtype", "float32"),
        decode_flags=("--engine.local-prefill-tokens", str(LOCAL_TOKENS)),
    ) as nodes:
        yield nodes


@pytest.fixture(scope="session")
def document_tokens(smollm2_path: Path) -> list[int]:
    """More than 7,000 tokens of English text."""
    return read_document(smollm2_path)
