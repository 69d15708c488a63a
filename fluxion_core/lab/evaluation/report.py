"""Policies side by side: scores, differences to `exact` with their uncertainty, bytes read.

Differences are paired: each case under a policy against the same case under `exact`. Confidence
intervals are 95 %, by bootstrap over cases; for averages over tasks, cases are drawn within their
task, so that every task weighs the same. Tasks that `exact` cannot do are named and left out of
averages: there, a difference would be noise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fluxion_core.lab.evaluation.work import EXACT, Answer

ABLE_SCORE = 50.0
"""A task counts if `exact` scores at least this."""

BOOTSTRAP_SAMPLES = 2000

FIXED = "fixed(16, 5 %)"
"""The baseline that bytes are also held against, if it was run."""


@dataclass(frozen=True)
class Interval:
    """A difference to `exact` in points, with its 95 % confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class TaskRow:
    """One task at one length."""

    task: str
    length: int
    cases: int
    """Answered by all ways; others are left out."""
    scores: dict[str, float]
    """Per way: mean, 0 to 100."""
    differences: dict[str, Interval]
    """Per way but `exact`."""
    is_able: bool
    """Whether `exact` can do it."""
    is_apart: bool = False
    """Whether its scores are no points, but agreement with `exact`."""

    @property
    def is_averaged(self) -> bool:
        """Whether averages count it."""
        return self.is_able and not self.is_apart


@dataclass(frozen=True)
class MethodBytes:
    """Bytes that a way read of the retrieval region per decode step, means over able cases."""

    scanned: float
    attended: float
    of_exact: float
    """Both together, as a share of what `exact` read."""
    of_fixed: float | None
    """As a share of what fixed(16, 5 %) read, if it was run."""
    streaming_share: float
    """Heads that read nothing of the region, mean over steps."""


@dataclass(frozen=True)
class Report:
    """Findings of a run."""

    ways: tuple[str, ...]
    rows: tuple[TaskRow, ...]
    average_scores: dict[str, float]
    """Per way: mean over able tasks; empty if there are none."""
    average_differences: dict[str, Interval]
    bytes_read: dict[str, MethodBytes]
    notes: tuple[str, ...]
    """What is left out, and why."""


def summarize(
    answers: Iterable[Answer],
    ways: Sequence[str],
    notes: Sequence[str] = (),
    *,
    able_score: float = ABLE_SCORE,
    apart: Collection[str] = (),
    seed: int = 0,
) -> Report:
    """A report of scored answers.

    Args:
        answers: of any number of tasks; those of other ways are ignored.
        ways: in the order of columns; `exact` must be one.
        notes: to be kept with it.
        able_score: what `exact` must score for a task to count.
        apart: tasks whose scores are no points: left out of averages, whatever they are.
        seed: of the bootstrap.
    """
    generator = np.random.default_rng(seed)
    rows, able_samples, able_answers = [], [], []
    all_notes = list(notes)
    for (task, length), cases in _by_task(answers, ways):
        whole = [case for case in cases if all(way in case for way in ways)]
        used = whole or [case for case in cases if EXACT in case]
        scores = {way: _scores(used, way) for way in ways if all(way in case for case in used)}
        exact_score = float(scores[EXACT].mean())
        samples = _bootstrap({way: s - scores[EXACT] for way, s in scores.items()}, generator)
        row = TaskRow(
            task,
            length,
            len(used),
            {way: float(values.mean()) for way, values in scores.items()},
            {way: _interval(samples[way]) for way in scores if way != EXACT},
            is_able=bool(whole) and exact_score >= able_score,
            is_apart=task in apart,
        )
        rows.append(row)
        if row.is_averaged:
            able_samples.append(samples)
            able_answers += whole
        else:
            all_notes.append(_why_left_out(row, able_score))
        if whole and len(whole) < len(cases):
            all_notes.append(
                f"{_label(task, length)}: {len(cases) - len(whole)} cases without all policies"
            )
    able = [row for row in rows if row.is_averaged]
    return Report(
        ways=tuple(ways),
        rows=tuple(rows),
        average_scores={way: _mean(row.scores[way] for row in able) for way in ways if able},
        average_differences={
            way: _interval(np.mean([samples[way] for samples in able_samples], axis=0))
            for way in ways
            if way != EXACT and able
        },
        bytes_read=_bytes_read(able_answers, ways),
        notes=tuple(all_notes),
    )


def _why_left_out(row: TaskRow, able_score: float) -> str:
    label = _label(row.task, row.length)
    if row.is_apart:
        return f"{label}: agreement with exact; left out of averages"
    return (
        f"{label}: exact scores {row.scores[EXACT]:.1f} over {row.cases} "
        f"cases, below {able_score:g}: the model cannot do it; left out of averages"
    )


def _by_task(
    answers: Iterable[Answer], ways: Sequence[str]
) -> list[tuple[tuple[str, int], list[dict[str, Answer]]]]:
    """Cases of each task and length, the shortest first: the scored answer of each way."""
    by_task: dict[tuple[str, int], dict[str, dict[str, Answer]]] = defaultdict(dict)
    # In an order of their own, not in that of their completion: the same answers, the same report.
    for answer in sorted(answers, key=lambda answer: answer.case_name):
        if answer.way in ways and answer.score is not None:
            of_task = by_task[answer.task, answer.length]
            of_task.setdefault(answer.case_name, {})[answer.way] = answer
    in_order = sorted(by_task.items(), key=lambda item: (item[0][1], item[0][0]))
    return [(key, list(cases.values())) for key, cases in in_order]


def paired_interval(differences: Sequence[float], *, seed: int = 0) -> Interval:
    """Mean of paired differences with its 95 % bootstrap interval."""
    samples = _bootstrap({"": np.asarray(differences)}, np.random.default_rng(seed))
    return _interval(samples[""])


def _scores(cases: Sequence[dict[str, Answer]], way: str) -> NDArray[np.float64]:
    return np.asarray([case[way].score for case in cases], dtype=np.float64)


def _bootstrap(
    differences: dict[str, NDArray[np.float64]], generator: np.random.Generator
) -> dict[str, NDArray[np.float64]]:
    """Per way: the mean, then means of resampled cases; the same cases for all ways."""
    count = len(next(iter(differences.values())))
    drawn = generator.integers(0, count, (BOOTSTRAP_SAMPLES, count))
    return {
        way: np.concatenate(([values.mean()], values[drawn].mean(1)))
        for way, values in differences.items()
    }


def _interval(samples: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(samples[1:], (0.025, 0.975))
    return Interval(float(samples[0]), float(low), float(high))


def _bytes_read(cases: Sequence[dict[str, Answer]], ways: Sequence[str]) -> dict[str, MethodBytes]:
    """Of steps that had a region."""
    found = {}
    rates = {way: _per_step([case[way] for case in cases]) for way in ways}
    streaming = {way: _streaming([case[way] for case in cases]) for way in ways}
    fixed = rates.get(FIXED)
    for way, (scanned, attended, region) in rates.items():
        if region:
            total = scanned + attended
            of_fixed = None
            if fixed is not None and fixed[2]:
                # Answers have different lengths: each is held against its own region.
                of_fixed = (total / region) / ((fixed[0] + fixed[1]) / fixed[2])
            found[way] = MethodBytes(scanned, attended, total / region, of_fixed, streaming[way])
    return found


def _per_step(answers: Sequence[Answer]) -> tuple[float, float, float]:
    """Scanned, attended and region bytes per step."""
    steps = max(1, sum(answer.steps for answer in answers))
    return (
        sum(answer.scanned_bytes for answer in answers) / steps,
        sum(answer.attended_bytes for answer in answers) / steps,
        sum(answer.region_bytes for answer in answers) / steps,
    )


def _streaming(answers: Sequence[Answer]) -> float:
    steps = max(1, sum(answer.steps for answer in answers))
    return sum(answer.streaming_share * answer.steps for answer in answers) / steps


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _label(task: str, length: int) -> str:
    return f"{task} at {length}" if length else task
