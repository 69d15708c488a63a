"""The end of a generation, and what of its text may be shown before that is known.

A stop string may arrive in pieces, so text that could be its beginning is held back until it is
clear. Neither a stop string nor the text of a stop token is ever shown. Into what pieces the text
was cut makes no difference: of several stop strings, the one that is complete first ends it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class StopSettings:
    """Ends of a generation: its length, texts and tokens."""

    max_new_tokens: int
    """Including a stop token."""
    stop_strings: tuple[str, ...] = ()
    """None of them empty, and none with a special token in it."""
    stop_tokens: Mapping[int, str] = field(default_factory=dict)
    """Special tokens that were given as stop strings, by id: they are no part of the text."""
    stop_token_ids: frozenset[int] = frozenset()
    """Beside the model's own."""
    eos_token_ids: frozenset[int] = frozenset()
    """The model's end-of-text tokens."""
    ignore_eos: bool = False
    """Go on past the model's end of text."""

    @property
    def ending_token_ids(self) -> frozenset[int]:
        """Tokens that end this generation."""
        asked_for = self.stop_token_ids.union(self.stop_tokens)
        return asked_for if self.ignore_eos else asked_for | self.eos_token_ids


class StopChecker:
    """Follows one generation, token by token."""

    def __init__(self, settings: StopSettings) -> None:
        self._settings = settings
        self._ending_token_ids = settings.ending_token_ids
        self._held = ""
        self._num_tokens = 0
        self.finish_reason: FinishReason | None = None
        """None while generation goes on."""
        self.matched_stop: str | int | None = None
        """The stop string or token of `settings` that ended it; None if something else did."""

    def is_ending_token(self, token_id: int) -> bool:
        """Whether this token ends the generation; its text must not be shown."""
        return token_id in self._ending_token_ids

    def push(self, token_id: int, text: str) -> str:
        """Take a token and the text that became final with it.

        No further token may follow once `finish_reason` is set. At "length", text may still be
        held back, because the detokeniser may owe some: give that to `push_text`.

        Returns:
            Text that may be shown now; the text of an ending token is not.
        """
        assert self.finish_reason is None, "generation has ended"
        self._num_tokens += 1
        if self.is_ending_token(token_id):
            self.finish_reason = "stop"
            if token_id in self._settings.stop_token_ids:
                self.matched_stop = token_id
            else:
                self.matched_stop = self._settings.stop_tokens.get(token_id)
            return self.flush()
        shown = self._take_text(text)
        if self.finish_reason is None and self._num_tokens >= self._settings.max_new_tokens:
            self.finish_reason = "length"
        return shown

    def push_text(self, text: str) -> str:
        """Take the generation's last text, which came without a token of its own.

        That is what a detokeniser still owes: before an ending token, or after the last token. It
        may complete a stop string, and then the reason is "stop".

        Returns:
            Text that may be shown, with what was held back; nothing after a stop.
        """
        if self.finish_reason == "stop":
            return ""
        return self._take_text(text) + self.flush()

    def flush(self) -> str:
        """Text held back, when nothing will follow."""
        held, self._held = self._held, ""
        return held

    def _take_text(self, text: str) -> str:
        text = self._held + text
        stops = self._settings.stop_strings
        found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
        if found:
            self.finish_reason = "stop"
            self._held = ""
            # First complete; of those, the longest.
            end, start = min(found)
            self.matched_stop = text[start:end]
            return text[:start]
        keep = max((_overlap(text, stop) for stop in stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, shorter than it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
