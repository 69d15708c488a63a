"""Both services on a GPU give what they give on the CPU: two real processes each."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch

from fluxion_proto.v1 import generate_pb2, generate_pb2_grpc
from tests.e2e.conftest import Cluster, free_port, running_cluster

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.model,
    pytest.mark.timeout(600),
]

NEW_TOKENS = 64
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 30, 9, 3, 64
WEIGHTS = 134_515_008


@pytest.fixture(scope="module", params=["both", "gpu", "cpu"])
def lanes(request: pytest.FixtureRequest) -> str:
    """Who attends to host KV."""
    return str(request.param)


@pytest.fixture(scope="module")
def on_gpu(
    lanes: str, smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """The model in float32, as on the CPU: else near ties may go the other way."""
    with running_cluster(
        smollm2_path,
        tmp_path_factory.mktemp(f"gpu-{lanes}"),
        *("--device", "cuda", "--model.dtype", "float32"),
        decode_flags=(*("--lanes", lanes), *decode_flags("0")),
    ) as nodes:
        yield nodes


def decode_flags(device_kv_bytes: str) -> tuple[str, ...]:
    """Flags of a decode node whose metrics are scraped."""
    return (
        *("--store.device-kv-bytes", device_kv_bytes),
        *("--metrics-listen", f"127.0.0.1:{free_port()}"),
    )


@pytest.fixture(scope="module", params=["auto", "16MiB"])
def with_tier(
    request: pytest.FixtureRequest, smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Room in device memory for all KV, or for that of 728 tokens."""
    with running_cluster(
        smollm2_path,
        tmp_path_factory.mktemp(f"tier-{request.param}"),
        *("--device", "cuda", "--model.dtype", "float32"),
        decode_flags=decode_flags(str(request.param)),
    ) as nodes:
        yield nodes


def generate(
    cluster: Cluster, token_ids: list[int], policy: str = ""
) -> tuple[list[int], generate_pb2.Usage]:
    request = generate_pb2.GenerateRequest(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    request.token_ids.ids.extend(token_ids)
    if policy:
        request.policy = policy
    with grpc.insecure_channel(cluster.decode.address) as channel:
        stub = generate_pb2_grpc.GenerationStub(channel)
        responses = list(stub.Generate(request, timeout=280))
        load = stub.GetLoad(generate_pb2.GetLoadRequest())
    assert (load.host_kv_reserved_bytes, load.running_requests) == (0, 0)
    return [t for response in responses for t in response.token_ids], responses[-1].usage


def first_difference(tokens: list[int], expected: list[int]) -> int:
    """Tokens that are the same before one differs."""
    pairs = enumerate(zip(tokens, expected, strict=True))
    return next((index for index, pair in pairs if len(set(pair)) > 1), NEW_TOKENS)


@pytest.mark.parametrize("num_tokens", [200, 2000, 7000])
def test_exact_gives_the_tokens_of_the_cpu(
    num_tokens: int, cluster: Cluster, on_gpu: Cluster, document_tokens: list[int]
) -> None:
    prompt = document_tokens[:num_tokens]
    expected, expected_usage = generate(cluster, prompt)
    tokens, usage = generate(on_gpu, prompt)
    assert tokens == expected
    assert usage.kv_bytes_read_per_token == pytest.approx(expected_usage.kv_bytes_read_per_token)


@pytest.mark.parametrize("policy", ["fixed(16, 5 %)", "marginal(0.3)", "threshold(0.1)"])
def test_other_policies_read_what_they_read_on_the_cpu(
    policy: str, cluster: Cluster, on_gpu: Cluster, document_tokens: list[int]
) -> None:
    prompt = document_tokens[:5000]
    expected, expected_usage = generate(cluster, prompt, policy)
    tokens, usage = generate(on_gpu, prompt, policy)
    # Of nearly equal blocks either may be read: one token that differs makes other text after it.
    assert first_difference(tokens, expected) >= 8
    assert usage.kv_reads.share_of_exact == pytest.approx(
        expected_usage.kv_reads.share_of_exact, rel=0.1
    )


@pytest.mark.parametrize("policy", ["exact", "fixed(16, 5 %)", "marginal(0.3)", "threshold(0.1)"])
def test_kv_in_device_memory_is_read_there_and_changes_no_choice(
    policy: str, cluster: Cluster, with_tier: Cluster, document_tokens: list[int]
) -> None:
    prompt = document_tokens[:5000]
    expected, expected_usage = generate(cluster, prompt, policy)
    before = counters(with_tier)
    tokens, usage = generate(with_tier, prompt, policy)
    grown = {name: n - before.get(name, 0.0) for name, n in counters(with_tier).items()}
    same = first_difference(tokens, expected)
    assert same == NEW_TOKENS if policy == "exact" else same >= 8
    reads = usage.kv_reads
    assert reads.share_of_exact == pytest.approx(expected_usage.kv_reads.share_of_exact, rel=0.1)
    # What is not resident is missed, by this policy alone; the request's own account is the same.
    kind = policy.partition("(")[0]
    hits, misses = (
        grown[f'fluxion_tier_{name}_bytes_total{{policy="{kind}"}}'] for name in ("hit", "missed")
    )
    steps = NEW_TOKENS - 1
    assert hits + misses == grown["fluxion_attended_bytes_total"]
    assert hits == pytest.approx(reads.resident_bytes_per_token * steps)
    assert hits > 0
    all_hits = sum(n for name, n in grown.items() if name.startswith("fluxion_tier_hit_bytes"))
    assert all_hits == hits


def test_a_tiers_memory_is_told_and_never_exceeded(
    with_tier: Cluster, document_tokens: list[int]
) -> None:
    for first in range(3):
        generate(with_tier, document_tokens[first * 100 : first * 100 + 3000], "fixed(16, 5 %)")
        now = counters(with_tier)
        with grpc.insecure_channel(with_tier.decode.address) as channel:
            load = generate_pb2_grpc.GenerationStub(channel).GetLoad(generate_pb2.GetLoadRequest())
        assert load.device_kv_capacity_bytes == now["fluxion_tier_capacity_bytes"]
        assert 0 < load.device_kv_held_bytes <= load.device_kv_capacity_bytes
        filled, given_up = (
            now[f"fluxion_tier_{name}_bytes_total"] for name in ("filled", "evicted")
        )
        # What left because its slab has another text now is in neither.
        assert now["fluxion_tier_held_bytes"] <= filled - given_up


def test_the_gpus_time_and_bytes_are_counted(
    lanes: str, on_gpu: Cluster, document_tokens: list[int]
) -> None:
    before = counters(on_gpu)
    generate(on_gpu, document_tokens[:3000])
    after = counters(on_gpu)
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    steps = NEW_TOKENS - 1
    pcie = 'fluxion_pcie_bytes_total{direction="%s",purpose="%s"}'
    row = (HEADS + 2 * KV_HEADS) * HEAD_DIM * 4
    assert grown["fluxion_decode_steps_total"] == steps
    assert grown[pcie % ("device_to_host", "queries")] == steps * LAYERS * row
    # The window: 64 first and up to 528 newest tokens.
    assert 0 < grown[pcie % ("host_to_device", "window")] <= 592 * 23_040
    assert after[pcie % ("host_to_device", "weights")] >= 4 * WEIGHTS
    on_cpu, by_lane = (grown[f'fluxion_tasks_total{{device="{name}"}}'] for name in ("cpu", "gpu"))
    assert on_cpu + by_lane == steps * LAYERS * KV_HEADS
    assert on_cpu == 0 or lanes != "gpu"
    assert by_lane == 0 or lanes != "cpu"
    read = grown[pcie % ("host_to_device", "selected_kv")]
    assert (read > 0) == (by_lane > 0)
    assert grown["fluxion_gpu_busy_seconds_total"] > 0
    assert grown['fluxion_gpu_idle_seconds_total{cause="host_step"}'] > 0
    assert grown['fluxion_gpu_idle_seconds_total{cause="host_attention"}'] > 0 or lanes != "cpu"


def counters(cluster: Cluster) -> dict[str, float]:
    """What the decode node's metrics endpoint says, by name and labels."""
    flags = cluster.decode.flags
    address = flags[flags.index("--metrics-listen") + 1]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line and not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def test_the_engine_agrees_with_the_card(
    lanes: str, on_gpu: Cluster, document_tokens: list[int]
) -> None:
    """Over some seconds in which four long sequences are decoded and nothing else runs."""
    if lanes == "cpu":
        pytest.skip("hardly a byte crosses the link")
    streams = [_Stream(on_gpu, document_tokens[first : first + 6500]) for first in range(4)]
    try:
        for stream in streams:
            stream.has_begun.wait(120)
        # The card's counter is moved on once a second: whole seconds are compared.
        before = _after_a_look(on_gpu)
        activity = []
        for _ in range(4):
            time.sleep(1)
            activity.append(counters(on_gpu).get('fluxion_nvml_activity_ratio{unit="graphics"}'))
        after = _after_a_look(on_gpu)
        assert not any(stream.has_ended.is_set() for stream in streams), "too short to measure"
    finally:
        for stream in streams:
            stream.cancel()
    if None in activity:
        pytest.skip("the driver does not tell this card's activity")

    def grown(name: str) -> float:
        return sum(after[key] - before[key] for key in after if key.startswith(name))

    idle = 'fluxion_gpu_idle_seconds_total{cause="%s"}'
    whole = grown("fluxion_gpu_busy_seconds_total") + grown("fluxion_gpu_idle_seconds_total")
    # A kernel that waits for the host is one that runs, to the card.
    at_rest = (grown(idle % "host_step") + grown(idle % "no_work")) / whole
    engine = grown('fluxion_pcie_bytes_total{direction="host_to_device"')
    card = grown('fluxion_nvml_pcie_bytes_total{direction="host_to_device"}')
    seen = 1 - sum(activity) / len(activity)
    figures = {
        "engine GB/s": engine / whole / 1e9,
        "card over engine": card / engine,
        "engine: at rest": at_rest,
        "card: at rest": seen,
        "engine: waits for the host": grown(idle % "host_attention") / whole,
    }
    print(lanes, {name: round(value, 3) for name, value in figures.items()})
    # Headers are a sixth of the payload where packets carry 128 bytes, less where they carry more.
    assert 1.0 <= card / engine <= 1.16 * 1.1
    assert seen == pytest.approx(at_rest, abs=0.1)


def _after_a_look(cluster: Cluster) -> dict[str, float]:
    """The counters just after the card's have moved."""
    name = 'fluxion_nvml_pcie_bytes_total{direction="host_to_device"}'
    first = counters(cluster)
    deadline = time.monotonic() + 10
    while (now := counters(cluster)).get(name) == first.get(name) and time.monotonic() < deadline:
        time.sleep(0.02)
    return now


class _Stream:
    """A long answer, read by a thread."""

    def __init__(self, cluster: Cluster, token_ids: list[int]) -> None:
        request = generate_pb2.GenerateRequest(max_new_tokens=1600, ignore_eos=True)
        request.token_ids.ids.extend(token_ids)
        self.has_begun, self.has_ended = threading.Event(), threading.Event()
        self._channel = grpc.insecure_channel(cluster.decode.address)
        self._call = generate_pb2_grpc.GenerationStub(self._channel).Generate(request)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            for _ in self._call:
                self.has_begun.set()
        except grpc.RpcError:
            pass
        self.has_ended.set()

    def cancel(self) -> None:
        """End it."""
        self._call.cancel()
        self._thread.join()
        self._channel.close()
