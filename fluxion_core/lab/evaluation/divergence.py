"""Divergence from `exact`, step by step: the KL of the next token's distribution, over bytes read.

Documents go in as plain text. The beginning of each is a prompt; what follows of it is fed token by
token, whatever a policy would have said itself. All ways are fed the same, so that steps are pairs.
Errors of earlier steps stay in what a way has stored, as they do when it generates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from fluxion_core.errors import ConfigError
from fluxion_core.lab.evaluation.agreement import forced_agreement, read_documents
from fluxion_core.lab.evaluation.case import Case
from fluxion_core.lab.evaluation.options import EvaluationOptions
from fluxion_core.lab.evaluation.report import FIXED, Interval, paired_interval
from fluxion_core.lab.evaluation.session import CaseSource, EvaluationModel, OnAnswer, Session
from fluxion_core.lab.evaluation.work import EXACT, Answer

TASK = "divergence"


@dataclass(frozen=True)
class DivergenceRow:
    """One way at one length against `exact`. Intervals are over documents."""

    way: str
    length: int
    documents: int
    steps: int
    """Of all documents."""
    divergence: Interval
    """Mean KL of a step, nats."""
    largest_twentieth: float
    """Share of the divergence that a twentieth of the steps make."""
    same_token: Interval
    """Share of steps with the same most likely token; 0 to 1."""
    of_exact: float
    """Bytes read of the region, as a share of what `exact` reads."""
    of_fixed: float | None
    """As a share of what fixed(16, 5 %) reads, if it was run."""


def run_divergence(
    model: EvaluationModel, options: EvaluationOptions, on_answer: OnAnswer
) -> tuple[list[DivergenceRow], Session]:
    """Feed documents and compare.

    Raises:
        ConfigError: no documents, or none is long enough.
    """
    documents = read_documents(options.data, "divergence is measured along long documents")
    fingerprint = hashlib.sha256("\0".join(text for _, text in documents).encode()).hexdigest()
    settings = {"documents": fingerprint[:16], "tokens fed": str(options.new_tokens)}
    tokenized = [model.tokenizer.encode(text) for _, text in documents]
    session = Session(model, options, settings, on_answer, max(options.lengths))
    sources: list[CaseSource] = []
    for length in options.lengths:
        long_enough = [ids[:length] for ids in tokenized if len(ids) >= length]
        if len(long_enough) < options.cases:
            session.notes.append(
                f"{len(long_enough)} of {len(documents)} documents have {length} tokens; "
                f"{options.cases} were asked for"
            )
        sources += [
            _source(ids, length, number, options.new_tokens)
            for number, ids in enumerate(long_enough[: options.cases])
        ]
    if not sources:
        raise ConfigError(f"no document in {options.data} is long enough for {options.lengths}")
    with closing(session):
        session.answer(sources, [replace(way, is_forced=True) for way in session.ways])
    names = {source.name for source in sources}
    answers = [a for a in session.journal.answers.values() if a.case_name in names]
    return compare_divergence(answers, [way.name for way in session.ways]), session


def compare_divergence(answers: Iterable[Answer], ways: Sequence[str]) -> list[DivergenceRow]:
    """Rows per length and way, from documents along which all ways were fed."""
    by_document: dict[tuple[int, str], dict[str, Answer]] = {}
    for answer in sorted(answers, key=lambda answer: answer.case_name):
        by_document.setdefault((answer.length, answer.case_name), {})[answer.way] = answer
    needed = {f"{way}, forced" for way in ways}
    rows = []
    for length in sorted({length for length, _ in by_document}):
        documents = [
            found
            for (own_length, _), found in by_document.items()
            if own_length == length and needed <= found.keys()
        ]
        rows += [_row(way, length, documents) for way in ways if way != EXACT and documents]
    return rows


def _row(way: str, length: int, documents: Sequence[dict[str, Answer]]) -> DivergenceRow:
    own = [document[f"{way}, forced"] for document in documents]
    exact = [document[f"{EXACT}, forced"] for document in documents]
    steps = np.concatenate([answer.divergences for answer in own])
    largest = np.sort(steps)[len(steps) - len(steps) // 20 :]
    of_exact = _bytes_of_region(own)
    fixed = [
        document[f"{FIXED}, forced"] for document in documents if f"{FIXED}, forced" in document
    ]
    return DivergenceRow(
        way=way,
        length=length,
        documents=len(documents),
        steps=len(steps),
        divergence=paired_interval([float(np.mean(answer.divergences)) for answer in own]),
        largest_twentieth=float(largest.sum() / max(steps.sum(), 1e-300)),
        same_token=paired_interval(
            [
                forced_agreement(reference.token_ids, answer.token_ids)
                for reference, answer in zip(exact, own, strict=True)
            ]
        ),
        of_exact=of_exact,
        of_fixed=of_exact / _bytes_of_region(fixed) if fixed and of_exact else None,
    )


def _bytes_of_region(answers: Sequence[Answer]) -> float:
    read = sum(answer.scanned_bytes + answer.attended_bytes for answer in answers)
    return read / max(1, sum(answer.region_bytes for answer in answers))


def _source(token_ids: Sequence[int], length: int, number: int, num_fed: int) -> CaseSource:
    split = length - num_fed
    if split < 1:
        raise ConfigError(f"length {length} leaves no prompt before {num_fed} tokens that are fed")
    case = Case(TASK, length, number, tuple(token_ids[:split]), (), None, num_fed)
    fed = tuple(token_ids[split:])
    return CaseSource(TASK, length, number, lambda: case, fed)
