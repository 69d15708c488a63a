"""`fluxion top`: rates from two looks at a node."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from services.cli.commands.top import Top
from services.cli.top import parse_samples, rows_of, run_top
from services.metrics import NodeMetrics
from services.metrics_endpoint import MetricsEndpoint
from tests.services.cli.command_line import invoke

NODE = """# TYPE fluxion_node_ready gauge
fluxion_node_ready{kind="decode"} 1
# TYPE fluxion_generated_tokens_total counter
fluxion_generated_tokens_total %d
# TYPE fluxion_gpu_busy_seconds_total counter
fluxion_gpu_busy_seconds_total %d
# TYPE fluxion_gpu_idle_seconds_total counter
fluxion_gpu_idle_seconds_total{cause="host_attention"} %d
fluxion_gpu_idle_seconds_total{cause="no_work"} 0
"""


def test_rates_and_shares_are_of_the_time_between_two_looks():
    before, now = parse_samples(NODE % (100, 10, 50)), parse_samples(NODE % (130, 13, 51))
    # By hand: 30 tokens in 2 s; busy 3 of 4 s, 1 of 4 s waiting for the CPU.
    assert dict(rows_of(before, now, 2.0)) == {
        "ready": "yes",
        "tokens generated": "15.0 /s",
        "GPU busy": "75 %",
        "GPU waits for CPU": "25 %",
    }


HANDOFFS = """# TYPE fluxion_handoff_bytes_total counter
fluxion_handoff_bytes_total{node="a:1",way="sockets"} %d
fluxion_handoff_bytes_total{node="a:1",way="grpc"} %d
# TYPE fluxion_data_plane_cpu_seconds_total counter
fluxion_data_plane_cpu_seconds_total{kind="decode"} %d
"""


def test_kv_is_shown_with_the_ways_that_it_came():
    ready = NODE.partition("# TYPE fluxion_generated")[0]
    before = parse_samples(ready + HANDOFFS % (0, 5_000_000, 1))
    # By hand: 30 MB by sockets and 10 by the call in 2 s, and a second of the threads.
    now = parse_samples(ready + HANDOFFS % (30_000_000, 15_000_000, 2))
    kv = [("KV handed off", "20.0 MB/s by sockets, grpc"), ("KV threads", "0.5 CPUs")]
    assert rows_of(before, now, 2.0) == [("ready", "yes"), *kv]
    still = [("KV handed off", "0.0 MB/s"), ("KV threads", "0.0 CPUs")]
    assert rows_of(now, now, 2.0) == [("ready", "yes"), *still]


MISSED = """# TYPE fluxion_head_error_missed gauge
fluxion_head_error_missed{level="FAST"} %d
fluxion_head_error_missed{level="BALANCED"} 0
"""


def test_levels_that_lose_more_than_they_promise_are_named():
    ready = NODE.partition("# TYPE fluxion_generated")[0]
    for missed, named in ((1, "FAST"), (0, "none")):
        now = parse_samples(ready + MISSED % missed)
        assert rows_of(now, now, 2.0)[1:] == [("levels that miss their aim", named)]


TIER = """# TYPE fluxion_tier_capacity_bytes gauge
fluxion_tier_capacity_bytes 8e+10
# TYPE fluxion_tier_held_bytes gauge
fluxion_tier_held_bytes 1.25e+10
# TYPE fluxion_tier_hit_bytes_total counter
fluxion_tier_hit_bytes_total{policy="fixed"} %d
fluxion_tier_hit_bytes_total{policy="exact"} %d
# TYPE fluxion_tier_missed_bytes_total counter
fluxion_tier_missed_bytes_total{policy="fixed"} %d
"""

TIER_DIGESTS = """# TYPE fluxion_tier_digest_bytes gauge
fluxion_tier_digest_bytes{memory="device"} %d
fluxion_tier_digest_bytes{memory="host"} %d
"""


def test_a_tier_says_what_it_holds_and_how_often_it_is_hit():
    ready = NODE.partition("# TYPE fluxion_generated")[0]
    before = parse_samples(ready + TIER % (100, 10, 50))
    # By hand: 60 and 30 B hit and 10 missed since.
    now = parse_samples(ready + TIER % (160, 40, 60))
    held = ("tier held", "12.5 of 80.0 GB")
    assert rows_of(before, now, 2.0) == [("ready", "yes"), ("tier hits", "90 %"), held]
    digests = TIER_DIGESTS % (8e9, 1.5e9)
    lacking = ("digests in host memory", "1.5 of 9.5 GB")
    assert (
        rows_of(before, parse_samples(ready + TIER % (160, 40, 60) + digests), 2.0)[-1] == lacking
    )
    assert rows_of(before, now | parse_samples(TIER_DIGESTS % (8e9, 0)), 2.0)[-1] == held
    # Without a step in between there is no rate.
    assert rows_of(now, now, 2.0) == [("ready", "yes"), held]


def test_what_a_node_does_not_export_has_no_row():
    samples = parse_samples(NODE.partition("# TYPE fluxion_generated")[0])
    assert rows_of(samples, samples, 1.0) == [("ready", "yes")]


def test_a_real_endpoint_is_shown_at_each_update():
    endpoint = MetricsEndpoint("127.0.0.1:0", NodeMetrics("decode"))
    shown, slept = io.StringIO(), []
    try:
        options = Top(addresses=(endpoint.address,), interval_seconds=3.0, updates=2)
        run_top(options, Console(file=shown), sleep=slept.append)
        assert slept == [3.0, 3.0]
        assert endpoint.address in shown.getvalue()
        assert "no" in shown.getvalue()
    finally:
        endpoint.close()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:1"])
def test_no_node_is_one_sentence(address):
    result = invoke(["top", address, "--updates", "1"])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"fluxion: no metrics at {address}")
