"""Placement of a prompt: this node computes what is missing of it, or a prefill node all of it.

Where the operator gives a limit (engine.local_prefill_tokens), that decides. Else the node that is
done sooner, by estimates (prompt_costs.py); what it comes to depends on load then, and so do the
last bits of a token's KV, which differ between the two. Each decision is logged with its figures,
and counted.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum

from fluxion_core.observe.log import event
from services.decode.config import DEFAULT_LOCAL_PREFILL_TOKENS
from services.decode.engine import EngineLoad
from services.decode.kv_ingest import HandoffResult
from services.decode.prefill_nodes import NodeLoad
from services.decode.prompt_costs import PromptCosts
from services.decode.request_counters import RequestCounters

_log = logging.getLogger(__name__)

UNTRIED_SPEED = 8
"""How many times as fast as this node a prefill node is thought to be that was not seen yet."""


class PlacementReason(StrEnum):
    """Reason for computing a prompt where it is computed."""

    SETTING = "setting"
    """The operator's limit."""
    NO_PREFILL_NODE = "no_prefill_node"
    """None is configured."""
    UNTRIED = "untried"
    """No hand-off was seen yet: little is computed here, and what is little beside the rest."""
    COST = "cost"
    """The smaller estimate."""


@dataclass(frozen=True)
class PlacementDecision:
    """The node that computes a prompt, this one or another, and why."""

    is_local: bool
    reason: PlacementReason
    here_seconds: float | None = None
    """Estimates, where the cost decided."""
    there_seconds: float | None = None


class Placement:
    """Decides for each prompt.

    Args:
        limit: the most tokens that are computed here; None: whatever is cheaper.
        has_prefill_nodes: whether any is configured.
        costs: estimates of both.
        load: what this node's engine has to do.
        least_load: asks prefill nodes where a prompt of so many tokens waits least.
        counters: count decisions.
    """

    def __init__(
        self,
        *,
        limit: int | None,
        has_prefill_nodes: bool,
        costs: PromptCosts,
        load: Callable[[], EngineLoad],
        least_load: Callable[[int], Awaitable[NodeLoad]],
        counters: RequestCounters,
    ) -> None:
        self._limit = limit
        self._has_prefill_nodes = has_prefill_nodes
        self._costs = costs
        self._load = load
        self._least_load = least_load
        self._counters = counters

    async def place(
        self, request_id: str, tokens: int, stored: int, *, wants_profile: bool
    ) -> PlacementDecision:
        """Decide, and say so.

        Args:
            request_id: for the log.
            tokens: of the prompt.
            stored: of them, whose KV is here.
            wants_profile: whether one of the prompt is needed.
        """
        decision = await self._decide(tokens, stored, wants_profile=wants_profile)
        where = "decode" if decision.is_local else "prefill"
        self._counters.placements[where, decision.reason.value] += 1
        estimates = {
            "decode_seconds": decision.here_seconds,
            "prefill_seconds": decision.there_seconds,
        }
        _log.info(
            event(
                "prompt placed",
                request_id=request_id,
                computed_by=where,
                reason=decision.reason.value,
                prompt_tokens=tokens,
                missing_tokens=tokens - stored,
                **{name: seconds for name, seconds in estimates.items() if seconds is not None},
            )
        )
        return decision

    def learn(self, tokens: int, handoff: HandoffResult) -> None:
        """Learn from the hand-off of a prompt of so many tokens."""
        self._costs.there.learn(
            tokens,
            handoff.trailer.prefill_seconds,
            handoff.payload_bytes,
            handoff.seconds,
        )

    async def _decide(self, tokens: int, stored: int, *, wants_profile: bool) -> PlacementDecision:
        missing, costs = tokens - stored, self._costs
        if self._limit is not None:
            return PlacementDecision(missing <= self._limit, PlacementReason.SETTING)
        if not self._has_prefill_nodes:
            return PlacementDecision(True, PlacementReason.NO_PREFILL_NODE)
        here = costs.here.seconds(missing, stored, self._load(), wants_profile=wants_profile)
        there = costs.there.seconds(tokens, missing * costs.kv_token_bytes, NodeLoad())
        if there is None:
            is_little = missing <= DEFAULT_LOCAL_PREFILL_TOKENS or missing * UNTRIED_SPEED <= tokens
            return PlacementDecision(is_little, PlacementReason.UNTRIED)
        if there < here:
            # Only now is it worth a question how long the prompt would wait there.
            least = await self._least_load(tokens)
            there = costs.there.seconds(tokens, missing * costs.kv_token_bytes, least) or there
        return PlacementDecision(here <= there, PlacementReason.COST, here, there)
