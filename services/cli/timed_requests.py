"""Requests of random tokens, timed: up to the first token, or as long as a stream lasts."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from itertools import pairwise

from fluxion_core.client import (
    AsyncClient,
    Delta,
    Finish,
    GenerationOptions,
    Progress,
    Usage,
)
from fluxion_core.errors import FluxionError
from fluxion_core.lab.benchmark.first_token import Answer
from services.cli.process_cpu import cpu_seconds_of
from services.cli.processes import NodeProcess

STREAM_NEW_TOKENS = 16_384
"""At most; a stream is cancelled when it has been watched for long enough."""


class Asker:
    """Sends prompts of random tokens, no two alike, and times their first tokens.

    Args:
        client: of the decode node.
        processes: of the prefill node and of the decode node.
        vocab_size: of the model.
        policy: what requests read.
    """

    def __init__(
        self,
        client: AsyncClient,
        processes: Sequence[NodeProcess],
        vocab_size: int,
        policy: str,
    ) -> None:
        self.client, self.policy = client, policy
        self._processes = processes
        self._vocab_size = vocab_size

    def prompt(self, num_tokens: int) -> list[int]:
        """Random token ids."""
        return [random.randrange(self._vocab_size) for _ in range(num_tokens)]

    async def ask(self, prompt: Sequence[int], known: asyncio.Event | None = None) -> Answer:
        """Send a prompt; the answer is one token.

        Args:
            prompt: token ids.
            known: set when the node has read the prompt, or it has ended.

        Raises:
            FluxionError: the request failed.
        """
        try:
            return await self._ask(prompt, known)
        finally:
            if known is not None:
                known.set()

    async def _ask(self, prompt: Sequence[int], known: asyncio.Event | None) -> Answer:
        asked = GenerationOptions(
            max_new_tokens=1,
            ignore_eos=True,
            policy=self.policy,
            report_progress=known is not None,
        )
        before = self._cpu_seconds()
        started = time.perf_counter()
        arrived: float | None = None
        usage: Usage | None = None
        async for event in self.client.stream(prompt, asked):
            if isinstance(event, Delta) and event.token_ids and arrived is None:
                arrived = time.perf_counter()
            elif isinstance(event, Progress) and event.prompt_tokens and known is not None:
                known.set()
            elif isinstance(event, Finish):
                usage = event.usage
        if arrived is None or usage is None:
            raise FluxionError(f"a prompt of {len(prompt)} tokens got no token")
        cpu = [later - earlier for earlier, later in zip(before, self._cpu_seconds(), strict=True)]
        return Answer(
            prompt_tokens=len(prompt),
            first_token_seconds=arrived - started,
            queue_seconds=usage.queue_seconds,
            prefill_seconds=usage.prefill_seconds,
            handoff_seconds=usage.handoff_seconds,
            handoff_bytes=usage.handoff_bytes,
            prefill_cpu_seconds=cpu[0],
            decode_cpu_seconds=cpu[1],
        )

    def _cpu_seconds(self) -> list[float]:
        return [cpu_seconds_of(process.pid) for process in self._processes]


class TokenTimes:
    """A stream that makes tokens until it is cancelled, and when each of them came."""

    def __init__(self, asker: Asker, num_tokens: int) -> None:
        self.arrivals: list[float] = []
        self._changed = asyncio.Event()
        self._reading = asyncio.create_task(self._read(asker, asker.prompt(num_tokens)))

    async def wait_for(self, count: int) -> None:
        """Wait until so many tokens have come.

        Raises:
            FluxionError: the stream ended before.
        """
        while len(self.arrivals) < count:
            self._changed.clear()
            changed = asyncio.create_task(self._changed.wait())
            await asyncio.wait((changed, self._reading), return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
            self._check()

    def gaps_from(self, first: int) -> list[float]:
        """Seconds between arrivals from this one on.

        Raises:
            FluxionError: the stream has ended, or no two tokens have come since.
        """
        self._check()
        gaps = [later - earlier for earlier, later in pairwise(self.arrivals[first:])]
        if not gaps:
            raise FluxionError(
                "the stream made no token meanwhile; give --quiet-steps or prompts more"
            )
        return gaps

    async def cancel(self) -> None:
        """End the stream; idempotent."""
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    def _check(self) -> None:
        if self._reading.done():
            self._reading.result()
            raise FluxionError(f"the stream ended after {len(self.arrivals)} tokens")

    async def _read(self, asker: Asker, prompt: list[int]) -> None:
        asked = GenerationOptions(
            max_new_tokens=STREAM_NEW_TOKENS, ignore_eos=True, policy=asker.policy
        )
        async for event in asker.client.stream(prompt, asked):
            if isinstance(event, Delta):
                self.arrivals += [time.perf_counter()] * len(event.token_ids)
                self._changed.set()
