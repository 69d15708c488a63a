"""Progress of a request's prompt, told while its first token is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from fluxion_proto.v1 import generate_pb2

OutputT = TypeVar("OutputT")

REPORT_SECONDS = 0.5
"""Between reports."""


class PromptProgress:
    """One prompt on its way; `follow` says who knows how far it is now."""

    def __init__(self) -> None:
        self.num_tokens = 0
        """Of the prompt; 0 until it is cut into tokens."""
        self._tokens_done: Callable[[], int] = int
        self._held_before = 0

    def follow(self, tokens_done: Callable[[], int]) -> None:
        """Ask `tokens_done` from now on; what it says now was there before anything is computed."""
        self._tokens_done = tokens_done
        self._held_before = tokens_done()

    def report(self) -> generate_pb2.PromptProgress:
        """The message that clients get."""
        done = self._tokens_done()
        is_computed = done > self._held_before
        return generate_pb2.PromptProgress(
            state=(
                generate_pb2.PROMPT_STATE_PREFILL
                if is_computed
                else generate_pb2.PROMPT_STATE_QUEUED
            ),
            prompt_tokens=self.num_tokens,
            prompt_tokens_done=done,
        )


async def next_or_report(
    outputs: asyncio.Queue[OutputT], progress: PromptProgress
) -> OutputT | generate_pb2.PromptProgress:
    """The next output, or a report if none comes for REPORT_SECONDS."""
    try:
        async with asyncio.timeout(REPORT_SECONDS):
            return await outputs.get()
    except TimeoutError:
        return progress.report()
