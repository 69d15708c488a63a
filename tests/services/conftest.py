"""A toy model on disk, and both nodes on loopback in this process, made by the real `serve`."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fluxion_core.config.settings import HandoffSettings, ModelSettings, ServerSettings
from fluxion_proto.v1 import generate_pb2, generate_pb2_grpc
from services.decode import __main__ as decode_node
from services.decode.config import DecodeSettings, PrefillSettings, StoreSettings
from services.decode.config import EngineSettings as DecodeEngineSettings
from services.prefill import __main__ as prefill_node
from services.prefill.config import EngineSettings as PrefillEngineSettings
from services.prefill.config import PrefillHandoffSettings, PrefillNodeSettings

TOY_CONTEXT_TOKENS = 2048


def write_toy_model(
    directory: Path, seed: int, *, num_layers: int = 2, context_tokens: int = TOY_CONTEXT_TOKENS
) -> None:
    """Write a random Llama that reads and writes bytes into an empty directory."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": context_tokens,
        "tie_word_embeddings": False,
        # Streams end where their requests say.
        "eos_token_id": None,
    }
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    tensors = {"model.embed_tokens.weight": weight(256, 64) * 8}
    tensors["lm_head.weight"] = weight(256, 64) * 2
    tensors["model.norm.weight"] = torch.ones(64)
    for index in range(num_layers):
        layer = f"model.layers.{index}"
        tensors[f"{layer}.input_layernorm.weight"] = torch.ones(64)
        tensors[f"{layer}.post_attention_layernorm.weight"] = torch.ones(64)
        tensors[f"{layer}.self_attn.q_proj.weight"] = weight(64, 64)
        tensors[f"{layer}.self_attn.k_proj.weight"] = weight(32, 64)
        tensors[f"{layer}.self_attn.v_proj.weight"] = weight(32, 64)
        tensors[f"{layer}.self_attn.o_proj.weight"] = weight(64, 64)
        tensors[f"{layer}.mlp.gate_proj.weight"] = weight(96, 64)
        tensors[f"{layer}.mlp.up_proj.weight"] = weight(96, 64)
        tensors[f"{layer}.mlp.down_proj.weight"] = weight(64, 96)
    save_file(tensors, directory / "model.safetensors")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))


@pytest.fixture(scope="session")
def make_toy_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Directory of a random Llama of two layers that reads and writes bytes; one per seed."""

    def make(seed: int) -> Path:
        directory = tmp_path_factory.mktemp(f"toy{seed}")
        write_toy_model(directory, seed)
        return directory

    return make


@pytest.fixture(scope="session")
def toy_model_path(make_toy_model: Callable[[int], Path]) -> Path:
    return make_toy_model(0)


@dataclass
class Running:
    """A node that serves in this process."""

    address: str
    ending: asyncio.Event
    task: asyncio.Task[None]


@asynccontextmanager
async def running_node(serve, settings) -> AsyncIterator[Running]:
    """A node that is ready; ended and awaited on the way out."""
    ending = asyncio.Event()
    task = asyncio.ensure_future(serve(settings, ending))
    try:
        async with grpc.aio.insecure_channel(settings.server.listen) as channel:
            ready = asyncio.ensure_future(channel.channel_ready())
            await asyncio.wait({ready, task}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                ready.cancel()
                task.result()
            await wait_ready(channel, settings)
        yield Running(settings.server.listen, ending, task)
    finally:
        ending.set()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def wait_ready(channel: grpc.aio.Channel, settings) -> None:
    """Wait until a prefill node's health serves, or a decode node takes calls: without a prefill
    node, as some tests have it, it is never ready."""
    if isinstance(settings, PrefillNodeSettings):
        await wait_serving(channel, "fluxion.v1.Handoff")
        return
    stub = generate_pb2_grpc.GenerationStub(channel)
    while True:
        try:
            await stub.GetModelInfo(generate_pb2.GetModelInfoRequest(), metadata=as_any(settings))
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                # It takes calls, though not from everybody.
                return
            await asyncio.sleep(0.02)
        else:
            return


def as_any(settings) -> tuple[tuple[str, str], ...]:
    """As a client of a node that has a list of them: it refuses others before it is ready."""
    if not settings.server.auth.token_file:
        return ()
    _, token = Path(settings.server.auth.token_file).read_text().split()[:2]
    return (("authorization", f"Bearer {token}"),)


async def wait_serving(channel: grpc.aio.Channel, service: str, *, is_serving: bool = True) -> None:
    """Watch a service's health until it is, or is not, serving."""
    statuses = health_pb2.HealthCheckResponse
    wanted = statuses.SERVING if is_serving else statuses.NOT_SERVING
    watch = health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(service=service)
    )
    async for answer in watch:
        if answer.status == wanted:
            break
    watch.cancel()


def free_address() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def server_settings(metrics_listen: str, unread_seconds: float = 20.0) -> ServerSettings:
    return ServerSettings(
        listen=free_address(),
        metrics_listen=metrics_listen,
        unread_seconds=unread_seconds,
        grace_seconds=0.5,
    )


def prefill_settings(
    model: Path,
    metrics_listen: str = "",
    unread_seconds: float = 20.0,
    handoff: PrefillHandoffSettings | None = None,
    **engine,
) -> PrefillNodeSettings:
    return PrefillNodeSettings(
        server=server_settings(metrics_listen, unread_seconds),
        model=ModelSettings(model=str(model), device="cpu", dtype="float32", threads=1),
        engine=PrefillEngineSettings(**{"chunk_tokens": 64, **engine}),
        handoff=handoff or PrefillHandoffSettings(),
    )


def decode_settings(
    model: Path,
    *prefill: str,
    store_bytes: int = 8 << 20,
    metrics_listen: str = "",
    stall_seconds: float = 10.0,
    handoff: HandoffSettings | None = None,
    **engine,
):
    return DecodeSettings(
        server=server_settings(metrics_listen),
        model=ModelSettings(model=str(model), device="cpu", dtype="float32", threads=1),
        store=StoreSettings(host_kv_bytes=store_bytes, slab_tokens=128),
        prefill=PrefillSettings(addresses=prefill, stall_seconds=stall_seconds),
        handoff=handoff or HandoffSettings(),
        # What these tests look at is the hand-off, also of short prompts.
        engine=DecodeEngineSettings(**{"local_prefill_tokens": 0, **engine}),
    )


@pytest.fixture
def start_prefill(toy_model_path: Path):
    """`async with start_prefill(...) as node`: a prefill node of the toy model."""

    def start(model: Path = toy_model_path, **engine):
        return running_node(prefill_node.serve, prefill_settings(model, **engine))

    return start


@pytest.fixture
def start_decode(toy_model_path: Path):
    """`async with start_decode(*prefill_addresses) as node`: a decode node of the toy model."""

    def start(*prefill: str, model: Path = toy_model_path, **options):
        return running_node(decode_node.serve, decode_settings(model, *prefill, **options))

    return start


@asynccontextmanager
async def generation_stub(address: str) -> AsyncIterator[generate_pb2_grpc.GenerationStub]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield generate_pb2_grpc.GenerationStub(channel)


@pytest.fixture
def open_stub():
    """`async with open_stub(address) as stub`: a client of a decode node."""
    return generation_stub


@pytest.fixture
def free_port() -> int:
    """A port of this machine that nobody listens on."""
    return int(free_address().rpartition(":")[2])


@pytest.fixture
def find_free_address() -> Callable[[], str]:
    """Makes host:port of this machine that nobody listens on."""
    return free_address
