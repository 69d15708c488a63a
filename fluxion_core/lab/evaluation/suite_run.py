"""Generated tasks: a pilot of `exact`, then all policies on those that are possible."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from statistics import mean

from fluxion_core.lab.evaluation.options import EvaluationOptions
from fluxion_core.lab.evaluation.report import ABLE_SCORE, Report, summarize
from fluxion_core.lab.evaluation.session import CaseSource, EvaluationModel, OnAnswer, Session
from fluxion_core.lab.evaluation.tasks.generated import Suite
from fluxion_core.lab.evaluation.tasks.ruler import TASK_NAMES, RulerSuite
from fluxion_core.lab.evaluation.work import EXACT, Answer, Method

PILOT_MARGIN = 20.0
"""A task whose pilot scores this much below ABLE_SCORE is given up: with 10 cases, one that scores
ABLE_SCORE falls there once in eighteen times."""

Sources = Mapping[tuple[str, int], Sequence[CaseSource]]
"""Cases by task and length."""


def wanted_answers(answers: Iterable[Answer], wanted: Collection[str]) -> list[Answer]:
    """Answers to the cases of these names."""
    return [answer for answer in answers if answer.case_name in wanted]


@dataclass(frozen=True)
class SuiteRun:
    """Running of the tasks of a suite.

    Args:
        suite: that makes them.
        names: of the tasks.
        answer: answers what a session lacks of cases, in these ways.
        scored: of all answers of a session, those to the cases of these names, as reports count
            them.
        apart: tasks that are reported, but are not points that an average could be taken of.
    """

    suite: Suite
    names: Sequence[str]
    answer: Callable[[Session, Sequence[CaseSource], Sequence[Method]], None] = Session.answer
    scored: Callable[[Iterable[Answer], Collection[str]], list[Answer]] = wanted_answers
    apart: Collection[str] = ()

    def run(self, session: Session) -> Report:
        """Answer and summarise; closes the session.

        Raises:
            ConfigError: a task cannot be made.
        """
        options, needs_file = session.options, self.suite.needs_file
        session.notes += [
            f"{name} needs a file (setting `{needs_file[name]}`); not run"
            for name in self.names
            if name in needs_file
        ]
        sources = {
            (name, length): [self._source(name, length, i) for i in range(options.cases)]
            for length in options.lengths
            for name in self.names
            if name not in needs_file
        }
        with closing(session):
            possible = self._pilot(session, sources)
            # Task after task in turn, so that a run that is stopped has as many cases of each.
            possible.sort(key=lambda source: source.number)
            self.answer(session, possible, session.ways)
        wanted = {source.name for of_task in sources.values() for source in of_task}
        answers = self.scored(session.journal.answers.values(), wanted)
        ways = [way.name for way in session.ways]
        return summarize(answers, ways, session.notes, apart=self.apart, seed=options.seed)

    def _pilot(self, session: Session, sources: Sources) -> list[CaseSource]:
        """Answer the first cases with `exact` alone; the cases of tasks that it is near enough."""
        count = session.options.pilot_cases
        pilots = [source for of_task in sources.values() for source in of_task[:count]]
        self.answer(session, pilots, [way for way in session.ways if way.name == EXACT])
        possible: list[CaseSource] = []
        for (name, length), of_task in sources.items():
            scores = self._exact_scores(session, of_task[:count])
            if scores and mean(scores) < ABLE_SCORE - PILOT_MARGIN:
                session.notes.append(
                    f"{name} at {length}: given up after a pilot of {len(scores)} cases of {EXACT}"
                )
            else:
                possible += of_task
        return possible

    def _exact_scores(self, session: Session, pilots: Sequence[CaseSource]) -> list[float]:
        names = {source.name for source in pilots}
        answers = self.scored(session.journal.answers.values(), names)
        return [a.score for a in answers if a.way == EXACT and a.score is not None]

    def _source(self, name: str, length: int, number: int) -> CaseSource:
        return CaseSource(name, length, number, lambda: self.suite.case(name, length, number))


def run_ruler(
    model: EvaluationModel, options: EvaluationOptions, on_answer: OnAnswer
) -> tuple[Report, Session]:
    """Answer and summarise RULER's tasks.

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
    return SuiteRun(suite, options.tasks or TASK_NAMES).run(session), session
