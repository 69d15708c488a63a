"""One sequence's tokens on their way from the engine's thread to the client, as text deltas."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from fluxion_core.generation.stopping import FinishReason, StopChecker
from fluxion_core.generation.tokenizer import IncrementalDetokenizer
from services.decode.request import GenerationRequest


@dataclass(frozen=True)
class Delta:
    """A token, and the text that became final with it."""

    token_id: int
    text: str


@dataclass(frozen=True)
class SequenceEnd:
    """End of a stream: the engine has let go of the sequence."""

    error: BaseException | None


class TokenStream:
    """Turns one sequence's tokens into text deltas; bridges the engine's thread to the event loop.

    `take` runs on whichever thread has the next token, one at a time; `next` on the event loop.
    """

    def __init__(
        self,
        request: GenerationRequest,
        detokenizer: IncrementalDetokenizer,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._detokenizer = detokenizer
        self._stop = StopChecker(request.stop)
        self._loop = loop
        self._items: asyncio.Queue[Delta | SequenceEnd] = asyncio.Queue()

    @property
    def finish_reason(self) -> FinishReason | None:
        """Reason of the end, stop or length, once known."""
        return self._stop.finish_reason

    @property
    def matched_stop(self) -> str | int | None:
        """The request's stop string or stop token that ended it, if one did."""
        return self._stop.matched_stop

    def take(self, token_id: int) -> bool:
        """Take a new token; returns whether generation goes on."""
        if self._stop.is_ending_token(token_id):
            text = self._stop.push_text(self._detokenizer.flush())
            if self._stop.finish_reason is None:
                text += self._stop.push(token_id, "")
        else:
            text = self._stop.push(token_id, self._detokenizer.push(token_id))
            if self._stop.finish_reason == "length":
                text += self._stop.push_text(self._detokenizer.flush())
        self._put(Delta(token_id, text))
        return self._stop.finish_reason is None

    def end(self, error: BaseException | None) -> None:
        """Take the end: the engine is done with the sequence."""
        self._put(SequenceEnd(error))

    async def next(self) -> Delta | SequenceEnd:
        """The next token's delta, or the end."""
        return await self._items.get()

    def _put(self, item: Delta | SequenceEnd) -> None:
        self._loop.call_soon_threadsafe(self._items.put_nowait, item)
