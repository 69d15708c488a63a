"""Nodes for the client's tests: a real one of a toy model, and one that follows a script."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from fluxion_core.config.settings import AuthSettings, ServerSettings, ServerTlsSettings
from fluxion_core.errors import FluxionError
from fluxion_core.wire.server import NodeServer
from fluxion_core.wire.status import PUSHBACK_KEY, sent_metadata
from fluxion_proto.v1 import generate_pb2, generate_pb2_grpc
from services.decode import __main__ as decode_node
from tests.certificates import Authority, write_secret
from tests.services.conftest import decode_settings, running_node, write_toy_model

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
)


TOKEN = "client-secret-5d41402abc4b2a76"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def toy_node(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """Address of a decode node that computes its prompts itself; it reads and writes bytes."""
    model = tmp_path_factory.mktemp("toy")
    write_toy_model(model, 0)
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    settings = decode_settings(model, local_prefill_tokens=2048)
    async with running_node(decode_node.serve, settings) as node:
        yield node.address


def delta(text: str, *token_ids: int) -> generate_pb2.GenerateResponse:
    return generate_pb2.GenerateResponse(request_id="r", text=text, token_ids=token_ids)


END = generate_pb2.GenerateResponse(
    finish_reason=generate_pb2.FINISH_REASON_STOP, usage=generate_pb2.Usage(generated_tokens=1)
)
PROGRESS = generate_pb2.GenerateResponse(
    progress=generate_pb2.PromptProgress(
        state=generate_pb2.PROMPT_STATE_PREFILL, prompt_tokens=7, prompt_tokens_done=3
    )
)


@dataclass
class Script:
    """What a call is answered with."""

    messages: tuple[generate_pb2.GenerateResponse, ...] = ()
    status: grpc.StatusCode | None = None
    """That ends it; OK if None."""
    retry_after_ms: int | None = None
    waits: bool = False
    """After the messages, until the call is cancelled."""


@dataclass
class ScriptedNode(generate_pb2_grpc.GenerationServicer):
    """Answers call after call as the scripts say; the last one's stays."""

    scripts: list[Script] = field(default_factory=lambda: [Script((delta("hi", 1), END))])
    requests: list[generate_pb2.GenerateRequest] = field(default_factory=list)
    address: str = ""
    was_cancelled: threading.Event = field(default_factory=threading.Event)

    def Generate(
        self, request: generate_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[generate_pb2.GenerateResponse]:
        script = self._next(request)
        context.add_callback(lambda: None if context.code() else self.was_cancelled.set())
        yield from script.messages
        if script.waits:
            self.was_cancelled.wait(60)
        self._fail(script, context)

    def Tokenize(
        self, request: generate_pb2.TokenizeRequest, context: grpc.ServicerContext
    ) -> generate_pb2.TokenizeResponse:
        self._fail(self._next(request), context)
        return generate_pb2.TokenizeResponse(token_ids=[7])

    def _next(self, request) -> Script:
        self.requests.append(request)
        return self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]

    def _fail(self, script: Script, context: grpc.ServicerContext) -> None:
        if script.status is None:
            context.set_code(grpc.StatusCode.OK)
            return
        metadata = [sent_metadata(FluxionError())]
        if script.retry_after_ms is not None:
            metadata.append((PUSHBACK_KEY, str(script.retry_after_ms)))
        context.set_trailing_metadata(metadata)
        context.abort(script.status, "the node's sentence")


@pytest.fixture
def scripted() -> Iterator[ScriptedNode]:
    """A node that follows its scripts."""
    node = ScriptedNode()
    server = grpc.server(ThreadPoolExecutor(max_workers=4))
    generate_pb2_grpc.add_GenerationServicer_to_server(node, server)
    node.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield node
    node.was_cancelled.set()
    server.stop(None).wait()


@dataclass
class SecretNode:
    """Where a node is that wants certificates and tokens, and what opens it."""

    address: str
    authority: Authority
    client_pair: tuple[Path, Path]
    token: Path
    in_thread = staticmethod(asyncio.to_thread)


class Says(generate_pb2_grpc.GenerationServicer):
    """Says hi, and has no load."""

    async def Generate(self, request, context):
        for message in (delta("hi", 1), END):
            yield message

    async def GetLoad(self, request, context):
        return generate_pb2.GetLoadResponse()


@pytest_asyncio.fixture
async def secret_node(tmp_path: Path) -> AsyncIterator[SecretNode]:
    """A server as nodes have it, with mutual TLS and tokens."""
    authority = Authority(tmp_path)
    certificate, key = authority.issue("node")
    tokens = write_secret(tmp_path / "tokens", f"web {TOKEN}\n")
    settings = ServerSettings(
        tls=ServerTlsSettings(certificate=certificate, key=key, client_authority=authority.path),
        auth=AuthSettings(token_file=tokens),
    )
    server = NodeServer(settings, "fluxion.v1.Generation")
    generate_pb2_grpc.add_GenerationServicer_to_server(Says(), server)
    address = await server.start()
    await server.set_ready(is_ready=True)
    token = write_secret(tmp_path / "token", TOKEN)
    yield SecretNode(address, authority, authority.issue("client"), token)
    await server.stop(0)
