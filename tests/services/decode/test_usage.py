"""Usage of a request, of figures that can be worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace

from fluxion_core.decode.step import StepReads
from fluxion_core.planning.policy import FixedPolicy
from services.decode.read_totals import ReadTotals
from services.decode.request_counters import RequestCounters
from services.decode.usage import RequestMeter, usage_of


def test_what_lay_in_device_memory_is_told_beside_what_was_read():
    reads = ReadTotals()
    # By hand: two steps, of 300 and 500 bytes of K and V, 200 and 400 of them in device memory.
    reads.add(StepReads(10, 300, region_bytes=1000, resident_bytes=200))
    reads.add(StepReads(20, 500, region_bytes=1000, resident_bytes=400))
    kv = SimpleNamespace(held_bytes=4096, shared_tokens=0, num_prompt_tokens=3)
    sequence = SimpleNamespace(
        kv=kv,
        reads=reads,
        steps=2,
        policy=FixedPolicy(16, 0.05),
        prompt_token_ids=[1, 2, 3],
        decode_seconds=1.0,
        queue_seconds=0.0,
        prefill_seconds=0.5,
    )
    usage = usage_of(sequence, RequestMeter(RequestCounters()), None, baseline_share=0.5)
    assert usage.kv_bytes_read_per_token == 415
    assert usage.kv_reads.attended_bytes_per_token == 400
    assert usage.kv_reads.resident_bytes_per_token == 300
    assert usage.kv_reads.share_of_exact == 0.415
