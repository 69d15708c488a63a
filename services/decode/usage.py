"""The usage of a request: metered while it runs, told with its last message."""

from __future__ import annotations

import time

from fluxion_proto.v1 import generate_pb2
from services.decode.engine import DecodeSequence
from services.decode.kv_ingest import HandoffResult
from services.decode.request_counters import RequestCounters


class RequestMeter:
    """Times and tokens of one request, from its arrival, which is when this is made.

    Args:
        counters: of the node; times from token to token go there too.
    """

    def __init__(self, counters: RequestCounters) -> None:
        self._counters = counters
        self._arrived_at = time.perf_counter()
        self._last_token_at = 0.0
        self.queue_seconds = 0.0
        """From the arrival to the admission."""
        self.num_tokens = 0
        """That left for the client."""
        self.first_token_seconds = 0.0
        """From the arrival to the first of them."""

    @property
    def seconds(self) -> float:
        """Since the request's arrival."""
        return time.perf_counter() - self._arrived_at

    def admit(self) -> None:
        """Note that the request holds its memory."""
        self.queue_seconds = self.seconds

    def count_token(self) -> None:
        """Count a token that leaves for the client."""
        now = time.perf_counter()
        self.num_tokens += 1
        self._counters.generated_tokens += 1
        if self.num_tokens == 1:
            self.first_token_seconds = now - self._arrived_at
            self._counters.first_token_seconds.observe(self.first_token_seconds)
        else:
            self._counters.inter_token_seconds.observe(now - self._last_token_at)
        self._last_token_at = now


def usage_of(
    sequence: DecodeSequence,
    meter: RequestMeter,
    handoff: HandoffResult | None,
    *,
    baseline_share: float,
) -> generate_pb2.Usage:
    """Usage of a request whose sequence has ended.

    Args:
        sequence: that the engine has let go of.
        meter: of the request.
        handoff: of its prompt; None if this node computed it.
        baseline_share: see `Planning.baseline_share`.
    """
    kv = sequence.kv
    usage = generate_pb2.Usage(
        prompt_tokens=len(sequence.prompt_token_ids),
        generated_tokens=meter.num_tokens,
        decode_seconds=sequence.decode_seconds,
        time_to_first_token_seconds=meter.first_token_seconds,
        kv_bytes_read_per_token=sequence.reads.total_bytes / max(1, sequence.steps),
        kv_bytes_in_host_memory=kv.held_bytes,
        kv_reads=_kv_reads(sequence, baseline_share),
    )
    if handoff is None:
        usage.cached_tokens = kv.shared_tokens
        usage.local_prompt_tokens = kv.num_prompt_tokens - kv.shared_tokens
        usage.queue_seconds = meter.queue_seconds + sequence.queue_seconds
        usage.prefill_seconds = sequence.prefill_seconds
    else:
        usage.cached_tokens = kv.kv_from_token
        usage.queue_seconds = meter.queue_seconds + handoff.trailer.queue_seconds
        usage.prefill_seconds = handoff.trailer.prefill_seconds
        usage.handoff_seconds = handoff.seconds
        usage.handoff_bytes = handoff.payload_bytes
    return usage


def _kv_reads(sequence: DecodeSequence, baseline_share: float) -> generate_pb2.KvReads:
    reads, steps = sequence.reads, max(1, sequence.steps)
    return generate_pb2.KvReads(
        policy=str(sequence.policy),
        scanned_bytes_per_token=reads.scanned_bytes / steps,
        attended_bytes_per_token=reads.attended_bytes / steps,
        share_of_exact=reads.share_of_exact,
        share_of_fixed_estimate=reads.share_of_exact / baseline_share,
        streaming_share=reads.streaming_share,
        groups_by_block_size=reads.groups_of_size,
        groups_nothing=reads.groups_nothing,
        groups_everything=reads.groups_everything,
        resident_bytes_per_token=reads.resident_bytes / steps,
    )
