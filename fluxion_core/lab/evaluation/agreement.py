"""Greedy agreement with `exact` on long documents: what a reader of the text would see differ.

Each way continues a document on its own; one changed token changes all that follow it, so that this
is a chaotic figure. Beside it, each way is also fed the tokens of `exact`: the share of steps with
the same most likely token is the steadier one. Documents go in as plain text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from fluxion_core.errors import ConfigError
from fluxion_core.lab.evaluation.case import Case
from fluxion_core.lab.evaluation.options import EvaluationOptions
from fluxion_core.lab.evaluation.report import Interval, paired_interval
from fluxion_core.lab.evaluation.session import CaseSource, EvaluationModel, OnAnswer, Session
from fluxion_core.lab.evaluation.work import EXACT, Answer

TASK = "agreement"


@dataclass(frozen=True)
class AgreementRow:
    """One way at one length against `exact`."""

    way: str
    length: int
    documents: int
    equal_share: Interval
    """Tokens before the first that differs, as a share of those of `exact`; 0 to 1."""
    first_divergence: float
    """Mean number of equal tokens before the first that differs; all of them where none does."""
    fully_equal: float
    """Share of documents without a difference."""
    forced_share: Interval
    """Steps with the same most likely token, fed with the tokens of `exact`; 0 to 1."""
    of_exact: float
    """Bytes read of the region, as a share of what `exact` read; fed with its tokens."""
    streaming_share: float


def run_agreement(
    model: EvaluationModel, options: EvaluationOptions, on_answer: OnAnswer
) -> tuple[list[AgreementRow], Session]:
    """Continue documents and compare.

    Raises:
        ConfigError: no documents, or none is long enough.
    """
    documents = read_documents(options.data, "agreement compares continuations of long documents")
    fingerprint = hashlib.sha256("\0".join(text for _, text in documents).encode()).hexdigest()
    settings = {"documents": fingerprint[:16], "new tokens": str(options.new_tokens)}
    session = Session(
        model,
        options,
        settings,
        on_answer,
        max(options.lengths),
        most_ways=2 * len(options.policies),
    )
    tokenized = [(name, model.tokenizer.encode(text)) for name, text in documents]
    sources = []
    for length in options.lengths:
        prompt_tokens = length - options.new_tokens
        long_enough = [(name, ids) for name, ids in tokenized if len(ids) >= prompt_tokens > 0]
        if len(long_enough) < options.cases:
            session.notes.append(
                f"{len(long_enough)} of {len(documents)} documents have the {prompt_tokens} tokens "
                f"that length {length} needs; {options.cases} were asked for"
            )
        for number, (_, ids) in enumerate(long_enough[: options.cases]):
            sources.append(_source(ids[:prompt_tokens], length, number, options.new_tokens))
    if not sources:
        raise ConfigError(f"no document in {options.data} is long enough for {options.lengths}")
    forced = [replace(way, is_forced=True) for way in session.ways if way.name != EXACT]
    with closing(session):
        session.answer(sources, [*session.ways, *forced])
    names = {source.name for source in sources}
    answers = [a for a in session.journal.answers.values() if a.case_name in names]
    return compare(answers, [way.name for way in session.ways]), session


def read_documents(directory: Path | None, why: str) -> list[tuple[str, str]]:
    """Names and texts of all files of a directory, by name.

    Raises:
        ConfigError: there is no directory, or no text in it.
    """
    if directory is None or not directory.is_dir():
        raise ConfigError(f"data is {directory}: no directory; {why}")
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    texts = [p for p in paths if p.suffix not in {".json", ".jsonl"} and p.name[0] != "."]
    if not texts:
        raise ConfigError(f"data {directory} holds no text files")
    return [(path.name, path.read_text(encoding="utf-8", errors="replace")) for path in texts]


def compare(answers: Iterable[Answer], ways: Sequence[str]) -> list[AgreementRow]:
    """Rows per length and way, from documents that all ways have continued, freely and forced."""
    by_document: dict[tuple[int, str], dict[str, Answer]] = {}
    for answer in answers:
        by_document.setdefault((answer.length, answer.case_name), {})[answer.way] = answer
    others = [way for way in ways if way != EXACT]
    needed = {EXACT, *others, *(f"{way}, forced" for way in others)}
    rows = []
    for length in sorted({length for length, _ in by_document}):
        documents = [
            found
            for (own_length, _), found in by_document.items()
            if own_length == length and needed <= found.keys()
        ]
        rows += [_row(way, length, documents) for way in others if documents]
    return rows


def equal_tokens(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of tokens that are equal before the first that differs."""
    for count, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return count
    return min(len(left), len(right))


def forced_agreement(exact: Sequence[int], forced: Sequence[int]) -> float:
    """Share of decode steps with the same token; the first token is prefill's, and no step."""
    steps = list(zip(exact[1:], forced[1:], strict=True))
    return sum(one == other for one, other in steps) / len(steps) if steps else 1.0


def _row(way: str, length: int, documents: Sequence[dict[str, Answer]]) -> AgreementRow:
    forced = [document[f"{way}, forced"] for document in documents]
    equal = [
        equal_tokens(document[EXACT].token_ids, document[way].token_ids) for document in documents
    ]
    shares = [
        count / len(document[EXACT].token_ids)
        for count, document in zip(equal, documents, strict=True)
    ]
    full = [document[EXACT].token_ids == document[way].token_ids for document in documents]
    agreed = [
        forced_agreement(document[EXACT].token_ids, answer.token_ids)
        for document, answer in zip(documents, forced, strict=True)
    ]
    read = sum(answer.scanned_bytes + answer.attended_bytes for answer in forced)
    steps = max(1, sum(answer.steps for answer in forced))
    return AgreementRow(
        way=way,
        length=length,
        documents=len(documents),
        equal_share=paired_interval(shares),
        first_divergence=mean(equal),
        fully_equal=mean(full),
        forced_share=paired_interval(agreed),
        of_exact=read / max(1, sum(answer.region_bytes for answer in forced)),
        streaming_share=sum(answer.streaming_share * answer.steps for answer in forced) / steps,
    )


def _source(token_ids: Sequence[int], length: int, number: int, new_tokens: int) -> CaseSource:
    case = Case(TASK, length, number, tuple(token_ids), (), None, new_tokens)
    return CaseSource(TASK, length, number, lambda: case)
