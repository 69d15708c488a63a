"""Real nodes of a small, deep model, and what a client sees of them.

The model has many thin layers: little KV, and a prompt that takes seconds, so that there is time to
do something to a node while it works.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from fluxion_proto.v1 import generate_pb2, generate_pb2_grpc, handoff_pb2, handoff_pb2_grpc
from services.decode import __main__ as decode_node
from services.prefill import __main__ as prefill_node
from tests.e2e.conftest import Node, free_port
from tests.services.conftest import (
    decode_settings,
    prefill_settings,
    running_node,
    write_toy_model,
)

NUM_LAYERS = 16
CONTEXT_TOKENS = 4096
LONG_TOKENS = 2500
"""A prompt whose hand-off takes seconds."""
SHORT_TOKENS = 300
CHUNK_TOKENS = 16
NEW_TOKENS = 8
STALL_SECONDS = 10.0
"""What nodes have by default (prefill.stall_seconds)."""
MAX_RUNNING = 4

GIVE_UP_SECONDS = 60.0
"""A client waits so long for what should have happened; then the row has failed."""


def write_model(directory: Path) -> Path:
    """The model of these tests, in an empty directory."""
    write_toy_model(directory, seed=3, num_layers=NUM_LAYERS, context_tokens=CONTEXT_TOKENS)
    return directory


@dataclass
class FaultNode(Node):
    """A node that can be killed, stopped, and started again at the same address."""

    metrics_address: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")

    def start(self) -> FaultNode:
        """Start the process; `wait_ready` waits for it."""
        listen = ("--metrics-listen", self.metrics_address)
        if listen[1] not in self.flags:
            self.flags = [*self.flags, *listen]
        super().start()
        return self

    @property
    def pid(self) -> int:
        """Of the process that runs."""
        assert self.process is not None
        return self.process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process is there."""
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """End the process at once, as if its machine had failed."""
        self.stop(signal.SIGKILL)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The process does not run within the block."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            if self.is_running:
                self.process.send_signal(signal.SIGCONT)

    def log(self) -> str:
        """Everything the node printed; nothing if that went into a device."""
        return super().log() if self.log_path.is_file() else ""

    def metrics(self) -> dict[str, float]:
        """What the node exports now: value by name with labels."""
        with urllib.request.urlopen(
            f"http://{self.metrics_address}/metrics", timeout=GIVE_UP_SECONDS
        ) as page:
            lines = page.read().decode().splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}


@dataclass(frozen=True)
class Seen:
    """How a request ended for its client."""

    tokens: list[int]
    status: str
    """OK, or the gRPC status."""
    details: str
    ended_at: float
    """time.monotonic() then."""


@dataclass
class Cluster:
    """Prefill nodes, decode nodes that pull from them, and one that needs none.

    `pair` pulls from both prefill nodes, `lone` from the first only. `twin` has a prefill node of
    its own, in this process, and is never harmed: what it says is right.
    """

    first: FaultNode
    second: FaultNode
    pair: FaultNode
    lone: FaultNode
    twin: str
    """host:port."""
    _seeds: Iterator[int] = field(default_factory=lambda: itertools.count(1000))

    def fresh_prompt(self, num_tokens: int) -> list[int]:
        """A prompt that no node has seen."""
        generator = random.Random(next(self._seeds))
        return [generator.randrange(256) for _ in range(num_tokens)]

    @property
    def nodes(self) -> list[FaultNode]:
        """All that can be harmed."""
        return [self.first, self.second, self.pair, self.lone]

    def heal(self) -> None:
        """Start again what is dead, and wait until it serves."""
        dead = [node for node in self.nodes if not node.is_running]
        for node in dead:
            node.start()
        for node in dead:
            node.wait_ready()

    async def right_tokens(self, prompt: Sequence[int], new_tokens: int = NEW_TOKENS) -> list[int]:
        """What the twin says."""
        seen = await ask(self.twin, prompt, new_tokens)
        assert seen.status == "OK", seen
        return seen.tokens

    async def assert_serves(self, decode: FaultNode) -> None:
        """A prompt that is new to it, handed over and decoded, gives the right tokens."""
        prompt = self.fresh_prompt(SHORT_TOKENS)
        seen = await ask(decode.address, prompt)
        assert seen.status == "OK", seen
        assert seen.tokens == await self.right_tokens(prompt)
        await assert_nothing_is_held(decode)

    async def handing_over(self, decode: FaultNode, prompt: Sequence[int]) -> asyncio.Task[Seen]:
        """A request of a prompt of which some KV has come, and not yet all."""
        has_kv = asyncio.Event()
        asking = asyncio.ensure_future(ask(decode.address, prompt, has_kv=has_kv))
        await has_kv.wait()
        assert not asking.done(), asking.result()
        return asking

    async def prefill_at_work(self, *nodes: FaultNode) -> FaultNode:
        """The node that has computed part of a prompt, and not yet all of it."""
        while True:
            for node in nodes:
                load = await prefill_load(node)
                if load.running_prompts and load.pending_tokens < LONG_TOKENS:
                    return node
            await asyncio.sleep(0.002)


@contextmanager
def running_cluster(
    directory: Path,
    *,
    first: Mapping[str, object] | None = None,
    lone: Mapping[str, object] | None = None,
    flags: Sequence[str] = (),
    first_flags: Sequence[str] = (),
) -> Iterator[Cluster]:
    """All nodes, ready; killed on the way out.

    Args:
        directory: an empty one for the model and logs.
        first: attributes of that node that are not as usual.
        lone: the same.
        flags: of all nodes but the twin's.
        first_flags: of the first prefill node.
    """
    (directory / "model").mkdir()
    model = write_model(directory / "model")
    common = [
        "--model",
        str(model),
        "--device",
        "cpu",
        "--model.dtype",
        "float32",
        "--model.threads",
        "1",
        *flags,
    ]

    def prefill(name: str, *more: str, **changes: object) -> FaultNode:
        flags = [*common, *more, "--engine.chunk-tokens", str(CHUNK_TOKENS)]
        flags += ["--engine.max-running-prompts", "1"]
        return FaultNode("prefill", flags, directory / f"{name}.log", **changes)

    def decode(name: str, *prefill_nodes: FaultNode, **changes: object) -> FaultNode:
        flags = [*common, "--store.host-kv-bytes", "96MiB", "--store.slab-tokens", "128"]
        flags += ["--engine.attention-threads", "1"]
        flags += ["--engine.max-running-sequences", str(MAX_RUNNING)]
        flags += ["--engine.local-prefill-tokens", "0"]
        flags += ["--prefill-addresses", ",".join(node.address for node in prefill_nodes)]
        return FaultNode("decode", flags, directory / f"{name}.log", **changes)

    one, two = prefill("first", *first_flags, **(first or {})), prefill("second")
    nodes = (one, two, decode("pair", one, two), decode("lone", one, **(lone or {})))
    with killed_at_the_end(nodes):
        for node in nodes:
            node.start()
        with running_twin(model, CHUNK_TOKENS) as twin:
            for node in nodes:
                node.wait_ready()
            yield Cluster(*nodes, twin)


@contextmanager
def killed_at_the_end(nodes: Sequence[FaultNode]) -> Iterator[None]:
    """Whatever runs then is killed."""
    try:
        yield
    finally:
        for node in nodes:
            if node.is_running:
                node.kill()


@contextmanager
def running_twin(model: Path, chunk_tokens: int) -> Iterator[str]:
    """host:port of a decode node with a prefill node of its own, on a thread of this process.

    Args:
        model: of both.
        chunk_tokens: as on the nodes it is compared with: sums then have the same order.
    """
    address, ending = "", asyncio.Event()
    loop = asyncio.new_event_loop()
    is_ready, failure = threading.Event(), None

    async def serve() -> None:
        nonlocal address
        of_prefill = prefill_settings(model, chunk_tokens=chunk_tokens)
        settings = decode_settings(
            model, of_prefill.server.listen, store_bytes=96 << 20, attention_threads=1
        )
        async with (
            running_node(prefill_node.serve, of_prefill),
            running_node(decode_node.serve, settings) as node,
        ):
            address = node.address
            is_ready.set()
            await ending.wait()

    def run() -> None:
        nonlocal failure
        try:
            loop.run_until_complete(serve())
        except BaseException as error:
            failure = error
        finally:
            loop.close()
            is_ready.set()

    thread = threading.Thread(target=run, name="twin")
    thread.start()
    is_ready.wait()
    try:
        if failure is not None:
            raise failure
        yield address
    finally:
        if failure is None:
            loop.call_soon_threadsafe(ending.set)
        thread.join()


def request_of(
    prompt: Sequence[int], new_tokens: int = NEW_TOKENS, **fields: object
) -> generate_pb2.GenerateRequest:
    """A greedy request for so many tokens, whatever they are."""
    request = generate_pb2.GenerateRequest(max_new_tokens=new_tokens, ignore_eos=True, **fields)
    request.token_ids.ids.extend(prompt)
    return request


@asynccontextmanager
async def client_of(address: str) -> AsyncIterator[generate_pb2_grpc.GenerationStub]:
    """A client with a connection of its own."""
    async with grpc.aio.insecure_channel(
        address, options=[("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    ) as channel:
        yield generate_pb2_grpc.GenerationStub(channel)


async def ask(
    address: str,
    prompt: Sequence[int],
    new_tokens: int = NEW_TOKENS,
    *,
    timeout: float = GIVE_UP_SECONDS,
    on_token: Callable[[int], None] = lambda _: None,
    has_kv: asyncio.Event | None = None,
) -> Seen:
    """One request of a client of its own.

    Args:
        address: of a decode node.
        prompt: token ids.
        new_tokens: to be generated.
        timeout: the client's deadline, s.
        on_token: takes the number of tokens there are, at each.
        has_kv: set once the decode node has taken in some of the prompt's KV, or at the end.
    """
    tokens: list[int] = []
    status, details = "OK", ""
    request = request_of(prompt, new_tokens, report_progress=has_kv is not None)
    async with client_of(address) as stub:
        try:
            async for response in stub.Generate(request, timeout=timeout):
                if has_kv is not None and response.progress.prompt_tokens_done:
                    has_kv.set()
                if response.token_ids:
                    tokens.extend(response.token_ids)
                    on_token(len(tokens))
        except grpc.aio.AioRpcError as error:
            status, details = error.code().name, error.details() or ""
        finally:
            if has_kv is not None:
                has_kv.set()
    return Seen(tokens, status, details, time.monotonic())


async def prefill_load(node: FaultNode) -> handoff_pb2.GetPrefillLoadResponse:
    """How busy a prefill node is."""
    async with grpc.aio.insecure_channel(node.address) as channel:
        stub = handoff_pb2_grpc.PrefillNodeStub(channel)
        return await stub.GetPrefillLoad(
            handoff_pb2.GetPrefillLoadRequest(), timeout=GIVE_UP_SECONDS
        )


async def load_of(node: FaultNode) -> generate_pb2.GetLoadResponse:
    """How busy a decode node is."""
    async with client_of(node.address) as stub:
        return await stub.GetLoad(generate_pb2.GetLoadRequest(), timeout=GIVE_UP_SECONDS)


async def until(what: Callable[[generate_pb2.GetLoadResponse], bool], node: FaultNode) -> None:
    """Return once a decode node's load is so; what never happens fails."""
    give_up_at = time.monotonic() + GIVE_UP_SECONDS
    while not what(load := await load_of(node)):
        assert time.monotonic() < give_up_at, load
        await asyncio.sleep(0.005)


async def assert_nothing_is_held(node: FaultNode) -> None:
    """What requests had is given back, by GetLoad and by the metrics."""
    await until(lambda load: not (load.running_requests or load.waiting_requests), node)
    load = await load_of(node)
    assert (load.host_kv_reserved_bytes, load.host_kv_used_bytes) == (0, 0), load
    metrics = await asyncio.to_thread(node.metrics)
    for state in ("reserved", "used"):
        assert metrics[f'fluxion_store_bytes{{state="{state}"}}'] == 0
    for name in ("requests_running", "requests_waiting", "store_sequences"):
        assert metrics[f"fluxion_{name}"] == 0


async def assert_no_prompt_is_left(node: FaultNode) -> None:
    """A prefill node has nothing more to compute."""
    give_up_at = time.monotonic() + GIVE_UP_SECONDS
    while (load := await prefill_load(node)).running_prompts or load.waiting_prompts:
        assert time.monotonic() < give_up_at, load
        await asyncio.sleep(0.005)
