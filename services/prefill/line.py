"""The line before the prefill engine: whose chunk is computed next, and who may begin.

Each prompt has a deadline: its arrival and PATIENCE times its own time. The earliest one's chunk is
next, of those that have begun and those that wait alike. So a short prompt goes before the rest of
long ones, prompts of one length go one after the other as they came, and a long one gives way only
to those that come early enough: nobody waits for ever. A prompt whose decode node does not take its
KV has no turn until it does.

A prompt begins with its first turn, if there is a place and room for its KV; from then on all its
KV is held. Where the first of those that wait has no room, nobody behind it begins.

Here is no thread and no clock: the engine holds its lock around every call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fluxion_core.errors import CapacityError
from services.prefill.prompt import Prompt

PATIENCE = 16
"""Own times of a prompt within which others may come that go before it."""

LARGEST_SHARE = 7 / 8
"""Of `running_kv_bytes`, that one prompt counts as at most: short ones have room beside it."""


@dataclass(frozen=True)
class PrefillLoad:
    """Work before the engine: prompts, and tokens still to be computed."""

    running_prompts: int
    """Those that have begun; those that pause are not among them."""
    paused_prompts: int
    waiting_prompts: int
    pending_tokens: int


@dataclass(frozen=True)
class PromptWait:
    """Work that would be done before a prompt that came now."""

    tokens: int
    seconds: float
    """Estimated; 0 before any chunk was computed."""


@dataclass(frozen=True)
class LineLimits:
    """Bounds of a line; see PrefillEngine."""

    chunk_tokens: int
    max_running: int
    max_waiting: int
    running_kv_bytes: int
    outgoing_bytes: int


class PromptLine:
    """Prompts that wait, that have begun, and whose last KV leaves.

    Args:
        own_seconds: of a prompt of so many tokens; it may change its mind.
        token_bytes: KV of a token.
        limits: places and memory.
    """

    def __init__(
        self, own_seconds: Callable[[int], float], token_bytes: int, limits: LineLimits
    ) -> None:
        self._own_seconds = own_seconds
        self._token_bytes = token_bytes
        self._limits = limits
        # In the order that they came or began: the first one of equal deadlines is next.
        self._waiting: list[Prompt] = []
        self._begun: list[Prompt] = []
        self._leaving: list[Prompt] = []
        """Computed, and not all taken when somebody last looked."""

    def add(self, prompt: Prompt) -> None:
        """Let a prompt wait.

        Raises:
            CapacityError: too many wait already.
        """
        # Those that free places are meant for do not count as waiting.
        free_places = max(0, self._limits.max_running - self._num_going())
        if len(self._waiting) >= self._limits.max_waiting + free_places:
            raise CapacityError(
                "prefill queue",
                needed=1,
                free=0,
                unit="places",
                remedy="retry later or on another prefill node",
            )
        self._waiting.append(prompt)

    def next(self) -> Prompt | None:
        """The prompt whose chunk is computed next, or that is to end; None: nobody can go on."""
        while True:
            going = [prompt for prompt in self._begun if self._goes_on(prompt)]
            turn = min(going, key=self._place, default=None)
            first = min(self._waiting, key=self._place, default=None)
            if first is None or not self._has_room_for(first):
                return turn
            if turn is not None and self._place(turn) <= self._place(first):
                return turn
            self._waiting.remove(first)
            self._begun.append(first)

    def cancel(self, prompt: Prompt) -> bool:
        """Give a prompt up: it has gone if it waited (True), else its end is next."""
        prompt.is_cancelled = True
        if prompt in self._leaving:
            self._leaving.remove(prompt)
        if prompt in self._waiting:
            self._waiting.remove(prompt)
            return True
        return False

    def end(self, prompt: Prompt, *, is_computed: bool) -> None:
        """Take a prompt out that has begun; if all is computed, what was not taken still counts."""
        self._begun.remove(prompt)
        if is_computed and not prompt.is_cancelled:
            self._leaving.append(prompt)

    def clear(self) -> list[Prompt]:
        """Take all out that are not computed."""
        prompts = [*self._begun, *self._waiting]
        self._begun.clear()
        self._waiting.clear()
        return prompts

    def load(self) -> PrefillLoad:
        """Prompts and tokens that are to be computed now."""
        running = self._num_going()
        return PrefillLoad(
            running_prompts=running,
            paused_prompts=len(self._begun) - running,
            waiting_prompts=len(self._waiting),
            pending_tokens=sum(
                len(prompt.token_ids) - prompt.num_computed
                for prompt in (*self._waiting, *self._begun)
            ),
        )

    def wait(self, num_tokens: int, now: float) -> PromptWait:
        """The wait of a prompt of so many tokens, if it came `now` (as `Prompt.submitted` counts).

        That is the rest of all whose deadlines are earlier, and of a later one's chunk, which is
        not interrupted, on average half.
        """
        deadline = now + PATIENCE * self._own_seconds(num_tokens)
        there = [prompt for prompt in (*self._waiting, *self._begun) if not prompt.is_cancelled]
        before = [prompt for prompt in there if self._deadline(prompt) <= deadline]
        tokens = sum(len(prompt.token_ids) - prompt.num_computed for prompt in before)
        seconds = sum(self._seconds_of(prompt, len(prompt.token_ids)) for prompt in before)
        going = [prompt for prompt in there if prompt in self._begun and self._goes_on(prompt)]
        turn = min(going, key=self._place, default=None)
        if turn is not None and turn not in before:
            seconds += self._seconds_of(turn, self._limits.chunk_tokens) / 2
        return PromptWait(tokens, seconds)

    def _seconds_of(self, prompt: Prompt, num_tokens: int) -> float:
        """What the next so many tokens of a prompt take, or fewer if it ends before."""
        end = min(len(prompt.token_ids), prompt.num_computed + num_tokens)
        return self._own_seconds(end) - self._own_seconds(prompt.num_computed)

    def _place(self, prompt: Prompt) -> tuple[bool, float]:
        """Lowest is next: who is only to end and gives memory back, then the earliest deadline."""
        return not prompt.is_cancelled, self._deadline(prompt)

    def _deadline(self, prompt: Prompt) -> float:
        return prompt.submitted + PATIENCE * self._own_seconds(len(prompt.token_ids))

    def _has_room_for(self, prompt: Prompt) -> bool:
        self._leaving = [other for other in self._leaving if other.outgoing_bytes()]
        if not (self._begun or self._leaving):
            return True
        held = sum(self._counted_bytes(other) for other in (prompt, *self._begun))
        held += sum(other.outgoing_bytes() for other in self._leaving)
        has_place = self._num_going() < self._limits.max_running
        return has_place and held <= self._limits.running_kv_bytes

    def _counted_bytes(self, prompt: Prompt) -> float:
        most = LARGEST_SHARE * self._limits.running_kv_bytes
        return min(len(prompt.token_ids) * self._token_bytes, most)

    def _num_going(self) -> int:
        """Prompts that have a place."""
        return sum(self._goes_on(prompt) for prompt in self._begun)

    def _goes_on(self, prompt: Prompt) -> bool:
        """Whether its next chunk's KV may be handed out, or it is to end."""
        if prompt.is_cancelled or not (waiting := prompt.outgoing_bytes()):
            return True
        tokens = min(self._limits.chunk_tokens, len(prompt.token_ids) - prompt.num_computed)
        return waiting + tokens * self._token_bytes <= self._limits.outgoing_bytes
