"""A generator's question: a text, what answers it, and how the answer begins."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A question before it is a model's prompt."""

    text: str
    answers: tuple[str, ...]
    answer_prefix: str = ""
    """Beginning of the answer that the model is to continue."""
