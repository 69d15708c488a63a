"""One question to a model, with what its answer is held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fluxion_core.errors import ContextLengthError
from fluxion_core.generation.chat import ChatMessage
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.lab.evaluation.collected import has_total, records_in
from fluxion_core.lab.evaluation.metrics import (
    Metric,
    first_code_line,
    match_all,
    match_part,
    score,
)

CLOSE_TOKENS = 16
"""A prompt this much below its limit is long enough."""


@dataclass(frozen=True)
class Case:
    """A prompt and how its answer is scored."""

    task: str
    """As the benchmark calls it, say niah_single_1."""
    length: int
    """Tokens that prompt and answer may have together; 0 where cases have lengths of their own."""
    number: int
    """Within its task and length."""
    prompt_token_ids: tuple[int, ...]
    answers: tuple[str, ...]
    """References: what they mean is the metric's business."""
    metric: Metric | None
    """None: the tokens count, the text is not scored."""
    max_new_tokens: int
    is_one_line: bool = False
    """Whether the answer ends at its first line break."""
    classes: tuple[str, ...] = ()
    """All labels, where the metric is classification."""
    answer_prefix: str = ""
    """Text after the prompt's question that the answer goes on from; part of the prompt."""

    @property
    def name(self) -> str:
        """Unique within a run; what the journal knows it by."""
        return f"{self.task}/{self.length}/{self.number}"

    def answer_of(self, text: str) -> str:
        """The part of a generated text that is the answer."""
        return first_line(text) if self.is_one_line else text

    def score_of(self, text: str) -> float | None:
        """Score of an answer, 0 to 100; None where there is no metric."""
        if self.metric is None:
            return None
        return score(self.metric, self._whole(text), self.answers, self.classes)

    def cannot_change(self, text: str) -> bool:
        """Whether the score of a generated text is the same, whatever follows it."""
        if self.is_one_line and "\n" in text.lstrip():
            return True
        if self.metric is Metric.MATCH_ALL:
            return match_all(text, self.answers) == 1.0
        if self.metric is Metric.RECORDS:
            return records_in(self._whole(text))[1]
        if self.metric is Metric.TOTAL:
            return has_total(self._whole(text))
        if self.metric is Metric.CODE_SIMILARITY:
            line = first_code_line(text)
            return bool(line) and f"{line}\n" in text
        return self.metric is Metric.MATCH_PART and match_part(text, self.answers) == 1.0

    def _whole(self, text: str) -> str:
        """The answer with its beginning, where a metric reads a form and not words."""
        is_form = self.metric in (Metric.RECORDS, Metric.TOTAL)
        return self.answer_prefix + text if is_form else text


def first_line(text: str) -> str:
    """The first line that holds anything."""
    return text.lstrip().split("\n", 1)[0]


class PromptEncoder:
    """Texts of tasks to prompts of one model.

    Args:
        tokenizer: of the model.
        is_chat: through the model's chat template, as one user message.
    """

    def __init__(self, tokenizer: Tokenizer, *, is_chat: bool) -> None:
        self.tokenizer = tokenizer
        self.is_chat = is_chat

    def encode(
        self, text: str, answer_prefix: str = "", said: Sequence[tuple[str, str]] = ()
    ) -> list[int]:
        """Token ids of a prompt.

        Args:
            text: that asks.
            answer_prefix: beginning of the model's own turn.
            said: before it in the same conversation: what was asked and what was answered.
        """
        if not self.is_chat:
            before = "".join(f"{asked}\n{answered}\n\n" for asked, answered in said)
            return self.tokenizer.encode(f"{before}{text}\n{answer_prefix}".rstrip("\n"))
        messages = [
            ChatMessage(role, content)
            for turn in said
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        prompt = self.tokenizer.render_chat([*messages, ChatMessage("user", text)])
        return self.tokenizer.encode(prompt + answer_prefix, add_special_tokens=False)

    def encode_cut(self, text: str, limit: int) -> list[int]:
        """Like `encode`; a text that is too long loses its middle.

        Args:
            text: of the whole prompt.
            limit: most tokens.

        Raises:
            ContextLengthError: the template alone is longer than that.
        """
        whole = self.encode(text)
        if len(whole) <= limit:
            return whole
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        room = limit - (len(whole) - len(tokens))
        while room > 0:
            # Cut tokens can join to others, so what comes out may still be a little too long.
            half = room // 2
            decode = self.tokenizer.decode
            cut = self.encode(decode(tokens[:half]) + decode(tokens[len(tokens) - (room - half) :]))
            if len(cut) <= limit:
                return cut
            room -= max(1, len(cut) - limit)
        raise ContextLengthError(
            prompt_tokens=len(whole), max_new_tokens=0, context_tokens=max(limit, 0)
        )


def largest_fitting(
    build: Callable[[int], Sequence[int]], limit: int, *, smallest: int, largest: int
) -> int:
    """A size whose prompt has at most `limit` tokens, and either nearly that or the next has more.

    Args:
        build: token ids of the prompt with so much haystack; longer with a larger size.
        limit: most tokens.
        smallest: size that must fit.
        largest: size that need not be exceeded.

    Raises:
        ContextLengthError: not even `smallest` fits.
    """
    tokens = len(build(smallest))
    if tokens > limit:
        raise ContextLengthError(
            prompt_tokens=tokens, max_new_tokens=0, context_tokens=max(limit, 0)
        )
    # Tokens are nearly linear in the size: the next guess lies where the line meets the limit.
    low, low_tokens = smallest, tokens
    high, high_tokens = largest + 1, 0
    step = max(1, smallest)
    while high - low > 1 and limit - low_tokens > CLOSE_TOKENS:
        if high_tokens:
            guess = low + (limit - low_tokens) * (high - low) // (high_tokens - low_tokens)
        else:
            guess = low + step
            step *= 4
        guess = min(max(guess, low + 1), high - 1)
        tokens = len(build(guess))
        if tokens <= limit:
            low, low_tokens = guess, tokens
        else:
            high, high_tokens = guess, tokens
    return low
