"""A trace of a real node: who is on it, and that its spans lie where they belong."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.request
from itertools import pairwise

import pytest

from fluxion_core.observe.trace_events import TraceEvent, TraceFile, tracks_of
from fluxion_proto.v1 import generate_pb2

STEPS = 5


def fetch_trace(address: str) -> TraceFile:
    url = f"http://{address}/trace?steps={STEPS}&seconds=60"
    with urllib.request.urlopen(url, timeout=120) as answer:
        assert answer.headers["Content-Type"].startswith("application/json")
        return json.loads(answer.read())


def lies_in(inner: TraceEvent, outer: TraceEvent) -> bool:
    # Microseconds, to the nanosecond.
    end = inner["ts"] + inner.get("dur", 0.0)
    return outer["ts"] - 5e-4 <= inner["ts"] and end <= outer["ts"] + outer["dur"] + 5e-4


@pytest.fixture
async def recorded(start_prefill, start_decode, open_stub, find_free_address):
    """A trace of more than one request, and the prefill node's address."""
    metrics = find_free_address()
    async with start_prefill() as prefill:
        async with start_decode(
            prefill.address, metrics_listen=metrics, attention_threads=3
        ) as node:
            tracing = asyncio.create_task(asyncio.to_thread(fetch_trace, metrics))
            async with open_stub(node.address) as stub:
                number = 0
                while not tracing.done():
                    # Three steps each: the trace holds the whole hand-off of one that came after
                    # it began.
                    request = generate_pb2.GenerateRequest(
                        request_id=f"{number:08}-of-ours",
                        text=f"{number:08}" * 88,
                        max_new_tokens=4,
                        ignore_eos=True,
                    )
                    async for _ in stub.Generate(request):
                        pass
                    number += 1
            yield await tracing, prefill.address


async def test_everybody_who_works_has_a_track(recorded):
    file, prefill = recorded
    tracks = tracks_of(file)
    assert file["otherData"]["steps"] == STEPS
    assert file["otherData"]["device"] == "cpu"
    streams = [track for track in tracks if track.startswith("handoff ")]
    assert [track for track in tracks if track not in streams] == [
        *("engine", "cpu 0", "cpu 1", "cpu 2", "cpu 3"),
    ]
    assert all(re.fullmatch(rf"handoff {prefill} \d{{8}}( kv)?", track) for track in streams)
    # K and V, 2 layers, 2 heads of 16 channels in bf16, of 704 tokens.
    payload = 704 * 2 * 2 * 2 * 16 * 2
    received = {track: sum(e["args"].get("bytes", 0) for e in tracks[track]) for track in streams}
    assert max(received[track] for track in streams if track.endswith(" kv")) == payload
    assert any(event["name"] == "connect" for track in streams for event in tracks[track])


async def test_spans_lie_where_they_belong(recorded):
    file, _ = recorded
    tracks = tracks_of(file)
    steps = [event for event in tracks["engine"] if event["name"] == "step"]
    forwards = [event for event in tracks["engine"] if event["name"] == "forward"]
    assert [step["args"]["step"] for step in steps] == list(range(STEPS))
    assert all(lies_in(forward, step) for forward, step in zip(forwards, steps, strict=True))
    work = [event for track, events in tracks.items() if track[:3] == "cpu" for event in events]
    for event in work:
        assert sum(lies_in(event, forward) for forward in forwards) == 1
    # By hand: 2 layers of 2 KV heads, each attended to in every step. The dense part has a task
    # before the first layer's attention, one after each, and the logits, which count as the last's.
    for forward in forwards:
        claims = [e for e in work if e["name"] == "claim" and lies_in(e, forward)]
        assert sorted((e["args"]["layer"], e["args"]["task"]) for e in claims) == [
            *((0, 0), (0, 0), (0, 0), (0, 1)),
            *((1, 0), (1, 0), (1, 0), (1, 1)),
        ]
    for events in tracks.values():
        for earlier, later in pairwise(event for event in events if event["ph"] == "X"):
            apart = later["ts"] >= earlier["ts"] + earlier["dur"] - 5e-4
            assert apart or lies_in(later, earlier)
