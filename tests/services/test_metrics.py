"""Metrics of both nodes over HTTP, after real requests, and the page that documents them."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fluxion_core.decode.step import HeadErrorSample
from fluxion_core.errors import CapacityError, ConfigError, DeadlineError, RequestCancelledError
from fluxion_core.observe.device_usage import DeviceUsage, TierUsage
from fluxion_core.observe.nvml import NvmlReadings
from fluxion_core.observe.spans import Span
from fluxion_core.observe.trace import Trace
from fluxion_core.planning.policy import FixedPolicy, MarginalPolicy
from fluxion_proto.v1 import generate_pb2
from services.decode.engine import EngineStatistics
from services.decode.head_errors import HeadErrors
from services.decode.metric_definitions import DECODE_DEFINITIONS
from services.decode.metrics import DecodeCollector, head_error_families
from services.decode.request_counters import RequestCounters
from services.gpu_metrics import (
    ENGINE_GPU_DEFINITIONS,
    NVML_DEFINITIONS,
    TIER_DEFINITIONS,
    NvmlCollector,
    device_families,
)
from services.metrics import NODE_DEFINITIONS, NodeMetrics, outcome_of
from services.metrics_endpoint import MetricsEndpoint
from services.prefill.metrics import PREFILL_DEFINITIONS

DEFINITIONS = {
    "both nodes": NODE_DEFINITIONS,
    "decode nodes": DECODE_DEFINITIONS,
    "prefill nodes": PREFILL_DEFINITIONS,
    "a GPU": ENGINE_GPU_DEFINITIONS,
    "a tier": TIER_DEFINITIONS,
    "NVML": NVML_DEFINITIONS,
}


def fetch(address: str, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=30) as answer:
        return answer.read().decode()


def families_of(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """Samples by the name they have in the exposition, values by label values."""
    samples: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return samples


def exported(text: str) -> dict[str, str]:
    """Type of every fluxion_ family."""
    return dict(re.findall(r"^# TYPE (fluxion_\w+) (\w+)$", text, re.MULTILINE))


@pytest.mark.parametrize("whose", DEFINITIONS)
def test_every_metric_is_in_the_reference(whose):
    page = (Path(__file__).parents[2] / "docs" / "reference" / "metrics.md").read_text()
    assert [one.name for one in DEFINITIONS[whose] if f"**`{one.name}`**" not in page] == []


async def test_a_request_is_counted_on_both_nodes(
    start_prefill, start_decode, open_stub, find_free_address
):
    prefill_metrics, decode_metrics = find_free_address(), find_free_address()
    async with start_prefill(metrics_listen=prefill_metrics) as prefill:
        async with start_decode(prefill.address, metrics_listen=decode_metrics) as node:
            async with open_stub(node.address) as stub:
                request = generate_pb2.GenerateRequest(
                    text="x" * 700, max_new_tokens=5, ignore_eos=True
                )
                async for _ in stub.Generate(request):
                    pass
                with pytest.raises(grpc.aio.AioRpcError):
                    async for _ in stub.Generate(generate_pb2.GenerateRequest()):
                        pass
            decode_text = await asyncio.to_thread(fetch, decode_metrics)
            prefill_text = await asyncio.to_thread(fetch, prefill_metrics)
    decode, of_prefill = families_of(decode_text), families_of(prefill_text)
    assert decode["fluxion_node_ready"] == {("decode",): 1}
    assert decode["fluxion_requests_total"] == {
        ("finished", "OK"): 1,
        ("cancelled", "CANCELLED"): 0,
        ("failed", "INTERNAL"): 0,
        ("failed", "INVALID_ARGUMENT"): 1,
    }
    # By hand: five tokens, the first of them from prefill; four steps, four gaps.
    assert decode["fluxion_generated_tokens_total"] == {(): 5}
    assert decode["fluxion_decode_steps_total"] == {(): 4}
    assert decode["fluxion_inter_token_seconds_count"] == {(): 4}
    assert decode["fluxion_time_to_first_token_seconds_count"] == {(): 1}
    assert decode["fluxion_request_seconds_count"] == {(): 1}
    assert decode["fluxion_prompt_tokens_total"] == {
        ("computed",): 700,
        ("local",): 0,
        ("cached",): 0,
    }
    assert decode["fluxion_handoffs_total"] == {(prefill.address, "shared_memory"): 1}
    # K and V, 2 layers, 2 heads of 16 channels in bf16, of 704 tokens: whole blocks.
    assert decode["fluxion_handoff_bytes_total"] == {
        (prefill.address, "shared_memory"): 704 * 2 * 2 * 2 * 16 * 2
    }
    assert decode["fluxion_groups_total"]["everything",] == 4 * 2 * 2
    assert decode["fluxion_tasks_total"] == {("cpu",): 4 * 2 * 2}
    assert sum(decode["fluxion_store_bytes"].values()) == decode["fluxion_store_capacity_bytes"][()]
    assert of_prefill["fluxion_prefill_prompts_total"]["finished", "OK"] == 1
    assert of_prefill["fluxion_prefill_tokens_total"] == {(): 700}
    assert of_prefill["fluxion_prefill_seconds_count"] == {(): 1}
    assert (
        of_prefill["fluxion_prefill_kv_bytes_total"][()]
        == decode["fluxion_handoff_bytes_total"][prefill.address, "shared_memory"]
    )
    # Every metric that needs no GPU, with its type, and no other.
    for text, definitions in (
        (decode_text, (*NODE_DEFINITIONS, *DECODE_DEFINITIONS)),
        (prefill_text, (*NODE_DEFINITIONS, *PREFILL_DEFINITIONS)),
    ):
        expected = {one.name: one.kind for one in definitions if not one.needs}
        assert exported(text) == expected


def make_collector(engine: _Engine) -> DecodeCollector:
    """A collector of which only the engine is asked."""
    nothing = (None, None, engine, None)
    return DecodeCollector(RequestCounters(), *nothing, HeadErrors({}))  # type: ignore[arg-type]


class _Engine:
    """An engine with these statistics."""

    def __init__(self, statistics) -> None:
        self._statistics = statistics

    def statistics(self):
        return self._statistics


def test_gpu_metrics_are_there_with_a_gpu_and_absent_without():
    usage = DeviceUsage(busy_seconds=3.0)
    usage.idle_seconds["host_attention"] = 2.0
    usage.pcie_bytes["host_to_device", "digests"] = 4096
    usage.tasks_by_device["gpu"] = 7
    for device, gpu_names in (
        (usage, {one.name for one in ENGINE_GPU_DEFINITIONS}),
        (None, set()),
    ):
        engine = _Engine(EngineStatistics(device=device))
        collector = make_collector(engine)
        families = {
            one.name + ("_total" if one.type == "counter" else ""): one
            for one in collector.collect_engine()
        }
        assert {name for name in families if "gpu" in name or "pcie" in name} == gpu_names
    engine = _Engine(EngineStatistics(device=usage))
    collector = make_collector(engine)
    families = {one.name: one for one in collector.collect_engine()}
    idle = {s.labels["cause"]: s.value for s in families["fluxion_gpu_idle_seconds"].samples}
    assert idle == {"host_attention": 2.0, "no_work": 0.0, "host_step": 0.0}
    pcie = {tuple(s.labels.values()): s.value for s in families["fluxion_pcie_bytes"].samples}
    assert pcie["host_to_device", "digests"] == 4096
    tasks = {s.labels["device"]: s.value for s in families["fluxion_tasks"].samples}
    assert tasks == {"cpu": 0, "gpu": 7}


def test_head_errors_are_exported_by_level():
    fast = MarginalPolicy(0.4)
    errors = HeadErrors({"FAST": fast})
    errors.add(fast, [HeadErrorSample(0.25, 0.04, 100), HeadErrorSample(0.25, 0.04, 60)])
    errors.add(FixedPolicy(16, 0.05), [HeadErrorSample(0.01, None, 7)])
    exported = {
        family.name: {tuple(sample.labels.values()): sample.value for sample in family.samples}
        for family in head_error_families(errors)
    }
    assert exported == {
        "fluxion_head_error": {
            ("FAST", "true"): 0.5,
            ("FAST", "predicted"): pytest.approx(0.2),
            ("fixed", "true"): pytest.approx(0.1),
        },
        "fluxion_head_error_samples": {("FAST",): 2, ("fixed",): 1},
        "fluxion_head_error_bytes": {("FAST",): 160, ("fixed",): 7},
        "fluxion_head_error_missed": {("FAST",): 0, ("fixed",): 0},
    }


def test_metrics_of_a_tier_are_there_with_one_and_absent_without():
    tier = TierUsage(capacity_bytes=80, held_bytes=32, filled_bytes=48, evicted_bytes=16)
    tier.digest_capacity_bytes, tier.digest_bytes["host"] = 20, 5
    tier.hit_bytes["threshold"] = 7
    tier.missed_bytes["exact"] = 9
    without = {one.name for one in device_families(DeviceUsage())}
    families = {one.name: one for one in device_families(DeviceUsage(tier=tier))}
    names = {one.name.removesuffix("_total"): one.kind for one in TIER_DEFINITIONS}
    assert {name: families[name].type for name in families.keys() - without} == names
    values = {
        name: {"".join(sample.labels.values()): sample.value for sample in families[name].samples}
        for name in names
    }
    assert values == {
        "fluxion_tier_capacity_bytes": {"": 80},
        "fluxion_tier_held_bytes": {"": 32},
        "fluxion_tier_hit_bytes": {"exact": 0, "fixed": 0, "threshold": 7, "marginal": 0},
        "fluxion_tier_missed_bytes": {"exact": 9, "fixed": 0, "threshold": 0, "marginal": 0},
        "fluxion_tier_filled_bytes": {"": 48},
        "fluxion_tier_evicted_bytes": {"": 16},
        "fluxion_tier_digest_capacity_bytes": {"": 20},
        "fluxion_tier_digest_bytes": {"device": 0, "host": 5},
    }


class _Card:
    """A reader of a card that may refuse."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.has_pcie = True
        self.looked = threading.Event()

    def look(self) -> None:
        self.looked.set()

    def read(self) -> NvmlReadings:
        if self.error is not None:
            raise self.error
        pcie = {"host_to_device": 5, "device_to_host": 6} if self.has_pcie else {}
        return NvmlReadings(pcie, 63e9, 0.5, {"graphics": 0.25})


@pytest.fixture
def card() -> _Card:
    return _Card()


@pytest.fixture
def collector(card: _Card):
    watching = NvmlCollector(card, look_seconds=0.01)  # type: ignore[arg-type]
    yield watching
    watching.close()


def test_a_card_is_read_at_each_scrape_and_what_it_cannot_tell_is_left_out(card, collector):
    names = {one.name + ("_total" if one.type == "counter" else "") for one in collector.collect()}
    assert names == {one.name for one in NVML_DEFINITIONS}
    card.error = DeadlineError("the driver is busy")
    assert list(collector.collect()) == []
    card.error, card.has_pcie = None, False
    assert "fluxion_nvml_pcie_bytes" not in {one.name for one in collector.collect()}


def test_a_card_is_looked_at_between_scrapes_until_the_endpoint_closes(card, collector):
    metrics = NodeMetrics("decode")
    served = MetricsEndpoint("127.0.0.1:0", metrics)
    metrics.loaded("model", "cuda:0", collector)
    assert card.looked.wait(30)
    served.close()
    card.looked.clear()
    # Its thread has ended: nobody looks any more.
    assert not card.looked.wait(0.05)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, ("finished", "OK")),
        (asyncio.CancelledError(), ("cancelled", "CANCELLED")),
        (GeneratorExit(), ("cancelled", "CANCELLED")),
        (RequestCancelledError("gone"), ("cancelled", "CANCELLED")),
        (
            CapacityError("host KV store", needed=2, free=1, unit="B", remedy="wait"),
            ("failed", "RESOURCE_EXHAUSTED"),
        ),
        (DeadlineError("late"), ("failed", "DEADLINE_EXCEEDED")),
        (ZeroDivisionError(), ("failed", "INTERNAL")),
    ],
)
def test_every_end_has_an_outcome_and_a_status(error, outcome):
    assert outcome_of(error) == outcome


@pytest.fixture
def endpoint():
    served = MetricsEndpoint("127.0.0.1:0", NodeMetrics("decode"))
    yield served
    served.close()


def test_a_node_that_loads_its_model_serves_that_it_is_not_ready(endpoint):
    families = families_of(fetch(endpoint.address))
    assert families["fluxion_node_ready"] == {("decode",): 0}
    assert families["process_open_fds"]
    assert "fluxion_node_info" not in families


@pytest.mark.parametrize(
    ("path", "status"), [("/", 404), ("/trace?steps=1", 404), ("/metrics/x", 404)]
)
def test_other_paths_are_not_found(endpoint, path, status):
    with pytest.raises(urllib.error.HTTPError) as refusal:
        fetch(endpoint.address, path)
    assert refusal.value.code == status
    refusal.value.close()


@pytest.mark.parametrize("listen", ["9464", "127.0.0.1:x", "127.0.0.1:99999", "203.0.113.1:80"])
def test_an_address_that_cannot_be_bound_is_a_config_error(listen):
    with pytest.raises(ConfigError, match=re.escape(listen)):
        MetricsEndpoint(listen, NodeMetrics("decode"))


def test_no_address_is_no_endpoint():
    served = MetricsEndpoint("", NodeMetrics("decode"))
    assert served.address == ""
    served.close()


def test_trace_queries_outside_the_limits_are_refused():
    metrics = NodeMetrics("decode")
    asked: list[tuple[int, float]] = []
    trace = Trace([], [Span("engine", "step", 1, 2)], ["engine"], 3, "steps", 1)
    metrics.take_trace = lambda steps, seconds: asked.append((steps, seconds)) or trace
    served = MetricsEndpoint("127.0.0.1:0", metrics)
    try:
        file = json.loads(fetch(served.address, "/trace?steps=3&seconds=2"))
        assert [event["name"] for event in file["traceEvents"] if event["ph"] == "X"] == ["step"]
        for query in ("steps=0", "steps=x", "seconds=0", "seconds=1000", "steps=1000000"):
            with pytest.raises(urllib.error.HTTPError) as refusal:
                fetch(served.address, f"/trace?{query}")
            assert refusal.value.code == 400
            refusal.value.close()
    finally:
        served.close()
    assert asked == [(3, 2.0)]
