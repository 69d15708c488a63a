"""RULER: a pilot of `exact`, then all policies side by side on the tasks that are possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from statistics import mean

from fluxion_core.lab.evaluation.options import EvaluationOptions
from fluxion_core.lab.evaluation.report import ABLE_SCORE, Report, summarize
from fluxion_core.lab.evaluation.session import CaseSource, EvaluationModel, OnAnswer, Session
from fluxion_core.lab.evaluation.tasks.ruler import TASK_NAMES, RulerSuite
from fluxion_core.lab.evaluation.work import EXACT

PILOT_MARGIN = 20.0
"""A task whose pilot scores this much below ABLE_SCORE is given up: with 10 cases, one that scores
ABLE_SCORE falls there once in eighteen times."""


def run_ruler(
    model: EvaluationModel, options: EvaluationOptions, on_answer: OnAnswer
) -> tuple[Report, Session]:
    """Answer and summarise.

    Raises:
        ConfigError: a task, file or policy cannot be used, or the journal is of another run.
    """
    suite = RulerSuite(model.encoder, options.seed, options.prose, options.squad, options.hotpot)
    session = Session(
        model,
        options,
        {"prose": suite.prose.origin, "texts": suite.fingerprint},
        on_answer,
        max(options.lengths),
    )
    names = options.tasks or TASK_NAMES
    for name in names:
        if name in suite.needs_file:
            setting = suite.needs_file[name]
            session.notes.append(f"{name} needs a file (setting `{setting}`); not run")
    names = tuple(name for name in names if name not in suite.needs_file)
    sources = {
        (name, length): [_source(suite, name, length, i) for i in range(options.cases)]
        for length in options.lengths
        for name in names
    }
    with closing(session):
        possible = _pilot(session, options, sources)
        # Task after task in turn, so that a run that is stopped has as many cases of each.
        session.answer(sorted(possible, key=lambda source: source.number), session.ways)
    answers = session.journal.answers.values()
    wanted = {source.name for of_task in sources.values() for source in of_task}
    ways = [way.name for way in session.ways]
    used = [answer for answer in answers if answer.case_name in wanted]
    return summarize(used, ways, session.notes, seed=options.seed), session


def _pilot(
    session: Session,
    options: EvaluationOptions,
    sources: Mapping[tuple[str, int], Sequence[CaseSource]],
) -> list[CaseSource]:
    """Answer the first cases with `exact` alone; the cases of tasks that it is near enough to."""
    pilots = [s for of_task in sources.values() for s in of_task[: options.pilot_cases]]
    session.answer(pilots, [way for way in session.ways if way.name == EXACT])
    possible: list[CaseSource] = []
    for (name, length), of_task in sources.items():
        scores = _pilot_scores(session, of_task[: options.pilot_cases])
        if scores and mean(scores) < ABLE_SCORE - PILOT_MARGIN:
            session.notes.append(
                f"{name} at {length}: given up after a pilot of {len(scores)} cases of {EXACT}"
            )
        else:
            possible += of_task
    return possible


def _pilot_scores(session: Session, pilots: Sequence[CaseSource]) -> list[float]:
    return session.scores([source.name for source in pilots], EXACT)


def _source(suite: RulerSuite, name: str, length: int, number: int) -> CaseSource:
    return CaseSource(name, length, number, lambda: suite.case(name, length, number))
