"""Scores of answers, 0 to 100. Plain text in, numbers out; no model, no tokenizer.

Sources: string match of RULER (arXiv:2404.06654); F1, ROUGE-L, classification and code similarity
as in LongBench (arXiv:2308.14508). Normalisation is that of SQuAD, ROUGE-L is the F-measure over
words in lower case, without stemming. Edit distances and longest common subsequences: rapidfuzz.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from enum import StrEnum

from fluxion_core.lab.evaluation.collected import numbers_iou, records_iou, total_nearness


class Metric(StrEnum):
    """Measure of an answer against its references."""

    MATCH_ALL = "match_all"
    """Share of the references that occur in the answer."""
    MATCH_PART = "match_part"
    """Whether one of the references occurs in the answer."""
    EXACT_MATCH = "exact_match"
    """Whether the answer is one of the references, after normalisation."""
    F1 = "f1"
    """Of words, after normalisation; the best reference counts."""
    ROUGE_L = "rouge_l"
    """F-measure of the longest common subsequence of words; the best reference counts."""
    CLASSIFICATION = "classification"
    """Whether the label is named; less if others are named too."""
    CODE_SIMILARITY = "code_similarity"
    """Edit similarity of the first line that is code; the best reference counts."""
    RECORDS = "records"
    """Fields of records in common, of those that either has; a reference is a record as JSON."""
    NUMBERS = "numbers"
    """Numbers in common, of those that either has."""
    TOTAL = "total"
    """Nearness of the number after the word "total"; one reference."""


_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WORD = re.compile(r"[a-z0-9]+")


def score(
    metric: Metric, answer: str, references: Sequence[str], classes: Sequence[str] = ()
) -> float:
    """Score of an answer, 0 to 100.

    Args:
        metric: how.
        answer: of the model.
        references: one or more.
        classes: all labels, for CLASSIFICATION.
    """
    match metric:
        case Metric.MATCH_ALL:
            value = match_all(answer, references)
        case Metric.MATCH_PART:
            value = match_part(answer, references)
        case Metric.CLASSIFICATION:
            value = classification(answer, references, classes)
        case Metric.EXACT_MATCH:
            value = _best(exact_match, answer, references)
        case Metric.F1:
            value = _best(token_f1, answer, references)
        case Metric.ROUGE_L:
            value = _best(rouge_l, answer, references)
        case Metric.CODE_SIMILARITY:
            value = _best(edit_similarity, first_code_line(answer), references)
        case Metric.RECORDS:
            value = records_iou(answer, references)
        case Metric.NUMBERS:
            value = numbers_iou(answer, references)
        case Metric.TOTAL:
            value = _best(total_nearness, answer, references)
    return 100 * value


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def match_all(answer: str, references: Sequence[str]) -> float:
    """Share of the references that occur in the answer, whatever the case."""
    lowered = answer.lower()
    return sum(reference.lower() in lowered for reference in references) / len(references)


def match_part(answer: str, references: Sequence[str]) -> float:
    """1 if a reference occurs in the answer, whatever the case, else 0."""
    lowered = answer.lower()
    return float(any(reference.lower() in lowered for reference in references))


def exact_match(answer: str, reference: str) -> float:
    """1 if both are the same after normalisation, else 0."""
    return float(normalise(answer) == normalise(reference))


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of the precision and recall of normalised words, as a bag."""
    given, wanted = normalise(answer).split(), normalise(reference).split()
    common = sum((Counter(given) & Counter(wanted)).values())
    if not common:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def rouge_l(answer: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words, in lower case.

    Source: Lin, ROUGE (2004), with precision and recall weighing the same.
    """
    # Imported here: RULER runs on machines that do not have it.
    from rapidfuzz.distance import LCSseq

    given, wanted = _WORD.findall(answer.lower()), _WORD.findall(reference.lower())
    common = LCSseq.similarity(given, wanted)
    if not common:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def edit_similarity(answer: str, reference: str) -> float:
    """1 - edit distance / length of the longer one; 1 for two empty texts."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_similarity(answer, reference)


def classification(answer: str, references: Sequence[str], classes: Sequence[str]) -> float:
    """1 / number of labels named, if the right one is among them.

    A label that is only named as a part of the right one does not count.
    """
    named = [label for label in classes if label in answer]
    best = 0.0
    for reference in references:
        others = [label for label in named if label == reference or label not in reference]
        if reference in others:
            best = max(best, 1 / len(others))
    return best


def first_code_line(answer: str) -> str:
    """The first line that is neither a comment nor a fence nor empty."""
    for line in answer.lstrip("\n").split("\n"):
        if line.strip() and not any(mark in line for mark in ("`", "#", "//")):
            return line
    return ""


def _best(of_one: Callable[[str, str], float], answer: str, references: Sequence[str]) -> float:
    return max(of_one(answer, reference) for reference in references)
