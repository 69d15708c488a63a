"""A watch over prefill nodes: they are asked all the time, so that a decode node
without one says so in its readiness before a client finds out.

A node counts that answers its load and does not drain. One that answers makes the decode node ready
at once; only when several looks in a row found none it is not ready any more, so that one answer
that is slow changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from services.decode.prefill_nodes import PrefillNodes
from services.decode.request_counters import RequestCounters

LOOK_SECONDS = 5.0
"""From one look to the next, while some node answers."""
SOON_SECONDS = 0.5
"""The same while none does."""
ANSWER_SECONDS = 2.0
"""For an answer."""
LOOKS_IN_VAIN = 3
"""In a row, before a node that was ready is not."""

NOT_ASKED_YET = "no prefill node has answered yet"


class PrefillWatch:
    """Tells whether some prefill node answers.

    Args:
        nodes: the prefill nodes; none for a node that is to do without.
        computes_prompts: whether this node computes prompts itself.
        tell: gets why no prompt can be computed, or "" if it can; also what has not changed.
        counters: get how many answered.
        pause: waits for so many seconds.
    """

    def __init__(
        self,
        nodes: PrefillNodes,
        *,
        computes_prompts: bool,
        tell: Callable[[str], Awaitable[None]],
        counters: RequestCounters,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._nodes = nodes
        self._computes_prompts = computes_prompts
        self._tell = tell
        self._pause = pause
        self._counters = counters

    @property
    def why_not_at_first(self) -> str:
        """Reason for which no prompt can be computed before the first look; empty if one can."""
        if self._nodes:
            return NOT_ASKED_YET
        if self._computes_prompts:
            return ""
        return (
            "no prefill node is configured (prefill.addresses), and this node computes no prompts "
            "itself (engine.local_prefill_tokens)"
        )

    async def run(self) -> None:
        """Look until cancelled."""
        if not self._nodes:
            return
        in_vain = LOOKS_IN_VAIN
        while True:
            refusals = await self._nodes.refusals(ANSWER_SECONDS)
            answering = list(refusals.values()).count("")
            self._counters.prefill_nodes_answering = answering
            in_vain = 0 if answering else in_vain + 1
            if answering:
                await self._tell("")
            elif in_vain >= LOOKS_IN_VAIN:
                told = "; ".join(f"{node}: {why}" for node, why in sorted(refusals.items()))
                await self._tell(f"no prefill node answers ({told or 'none was found'})")
            await self._pause(LOOK_SECONDS if answering else SOON_SECONDS)
