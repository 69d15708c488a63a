"""Counters of requests and hand-offs, in plain numbers, which a scrape reads."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from fluxion_core.config.carriers import Carrier
from fluxion_core.observe.metrics import PlainHistogram
from services.metrics import SECONDS_BOUNDS, USUAL_ENDS, outcome_of

INTER_TOKEN_BOUNDS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1),
    *(0.125, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 10),
)
"""Upper bounds of the time from one token to the next, s."""


@dataclass
class RequestCounters:
    """Sums over requests and hand-offs. Written on the event loop only."""

    ended: Counter[tuple[str, ...]] = field(
        default_factory=lambda: Counter(dict.fromkeys(USUAL_ENDS, 0))
    )
    queue_seconds: PlainHistogram = field(default_factory=lambda: PlainHistogram(SECONDS_BOUNDS))
    first_token_seconds: PlainHistogram = field(
        default_factory=lambda: PlainHistogram(SECONDS_BOUNDS)
    )
    inter_token_seconds: PlainHistogram = field(
        default_factory=lambda: PlainHistogram(INTER_TOKEN_BOUNDS)
    )
    request_seconds: PlainHistogram = field(default_factory=lambda: PlainHistogram(SECONDS_BOUNDS))
    prompt_tokens: Counter[tuple[str, ...]] = field(
        default_factory=lambda: Counter({("computed",): 0, ("local",): 0, ("cached",): 0})
    )
    placements: Counter[tuple[str, ...]] = field(
        default_factory=lambda: Counter({("decode", "cost"): 0, ("prefill", "cost"): 0})
    )
    """By who computes what is missing of a prompt, and why; see placement.py."""
    generated_tokens: int = 0
    prefill_nodes_answering: int = 0
    handoffs: Counter[tuple[str, ...]] = field(default_factory=Counter)
    handoff_bytes: Counter[tuple[str, ...]] = field(default_factory=Counter)
    handoff_seconds: PlainHistogram = field(default_factory=lambda: PlainHistogram(SECONDS_BOUNDS))
    handoff_failures: Counter[tuple[str, ...]] = field(
        default_factory=lambda: Counter({("UNAVAILABLE",): 0})
    )

    def request_ended(self, error: BaseException | None, seconds: float) -> None:
        """Count the end of a Generate request."""
        self.ended[outcome_of(error)] += 1
        if error is None:
            self.request_seconds.observe(seconds)

    def admitted(
        self, *, prompt_tokens: int, cached_tokens: int, is_local: bool, seconds: float
    ) -> None:
        """Count a request that got its memory, `seconds` after it came.

        is_local: this node computes its prompt.
        """
        self.queue_seconds.observe(seconds)
        source = "local" if is_local else "computed"
        self.prompt_tokens[source,] += prompt_tokens - cached_tokens
        self.prompt_tokens["cached",] += cached_tokens

    def handed_off(self, node: str, way: Carrier, *, num_bytes: int, seconds: float) -> None:
        """Count a hand-off that was committed, by prefill node and by the way that KV came."""
        self.handoffs[node, way.value] += 1
        self.handoff_bytes[node, way.value] += num_bytes
        self.handoff_seconds.observe(seconds)

    def handoff_failed(self, error: BaseException) -> None:
        """Count a hand-off attempt that came to nothing."""
        self.handoff_failures[outcome_of(error)[1],] += 1
