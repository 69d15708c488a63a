"""Tasks that collect: conversations turn after turn, summaries against those of `exact`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from statistics import mean

from fluxion_core.errors import ConfigError
from fluxion_core.lab.evaluation.agreement import forced_agreement
from fluxion_core.lab.evaluation.metrics import rouge_l
from fluxion_core.lab.evaluation.options import EvaluationOptions
from fluxion_core.lab.evaluation.report import Report
from fluxion_core.lab.evaluation.session import CaseSource, EvaluationModel, OnAnswer, Session
from fluxion_core.lab.evaluation.suite_run import SuiteRun, wanted_answers
from fluxion_core.lab.evaluation.tasks.collect import (
    LOOKUPS,
    SUMMARY,
    TASK_NAMES,
    CollectSuite,
    turn_task,
)
from fluxion_core.lab.evaluation.tasks.conversation import TURNS
from fluxion_core.lab.evaluation.work import EXACT, Answer, Method

SUMMARY_TOKENS_TASK = "summary, tokens"
"""Row of the share of equal tokens, fed with those of `exact`."""

_FORCED = ", forced"


def run_collect(
    model: EvaluationModel, options: EvaluationOptions, on_answer: OnAnswer
) -> tuple[Report, Session]:
    """Answer and summarise.

    Raises:
        ConfigError: a task or policy cannot be used, or the journal is of another run.
    """
    names = options.tasks or TASK_NAMES
    for name in names:
        if name not in TASK_NAMES:
            raise ConfigError(f"no task {name!r} that collects; one of {', '.join(TASK_NAMES)}")
    suite = CollectSuite(model.encoder, options.seed, options.prose)
    session = Session(
        model,
        options,
        {"prose": suite.prose.origin, "texts": suite.fingerprint},
        on_answer,
        max(options.lengths),
        most_ways=2 * len(options.policies),
    )
    run = SuiteRun(
        suite,
        names,
        partial(_answer, suite),
        scored_answers,
        apart=(SUMMARY, SUMMARY_TOKENS_TASK),
    )
    return run.run(session), session


def scored_answers(answers: Iterable[Answer], wanted: Collection[str]) -> list[Answer]:
    """Answers as reports count them: a conversation is one case, a summary has a score.

    Args:
        answers: of any cases.
        wanted: names of cases and conversations.
    """
    all_answers = list(answers)
    found = wanted_answers([*all_answers, *_conversations(all_answers)], wanted)
    summaries = [answer for answer in found if answer.task == SUMMARY]
    others = [answer for answer in found if answer.task != SUMMARY]
    return [*others, *_scored_summaries(summaries)]


def _answer(
    suite: CollectSuite,
    session: Session,
    sources: Sequence[CaseSource],
    ways: Sequence[Method],
) -> None:
    """Answer cases, a batch after the other: a run that is stopped has some of each task."""
    batch = session.options.batch
    for first in range(0, len(sources), batch):
        _answer_some(suite, session, sources[first : first + batch], ways)


def _answer_some(
    suite: CollectSuite,
    session: Session,
    sources: Sequence[CaseSource],
    ways: Sequence[Method],
) -> None:
    forced = [replace(way, is_forced=True) for way in ways if way.name != EXACT]
    session.answer_each(
        [
            (source, [*ways, *forced] if source.task == SUMMARY else ways)
            for source in sources
            if source.task != LOOKUPS
        ]
    )
    conversations = [source for source in sources if source.task == LOOKUPS]
    for turn in range(TURNS):
        turns = [_turn(suite, session, source, turn, ways) for source in conversations]
        session.answer_each([asked for courses in turns for asked in courses])


def _turn(
    suite: CollectSuite,
    session: Session,
    source: CaseSource,
    turn: int,
    ways: Sequence[Method],
) -> list[tuple[CaseSource, list[Method]]]:
    """The next turn of a conversation: a case for each course that it has taken until here.

    Ways that have given the same answers share one. A conversation that was cut short, because it
    does not fit or time is out, has no next turn.
    """
    length, number = source.length, source.number
    before = [f"{turn_task(earlier)}/{length}/{number}" for earlier in range(turn)]
    courses: dict[tuple[str, ...], list[Method]] = {}
    for way in ways:
        given = [session.journal.answers.get((name, way.key)) for name in before]
        said = tuple(answer.text for answer in given if answer is not None)
        if len(said) == turn:
            courses.setdefault(said, []).append(way)
    return [
        (
            CaseSource(
                turn_task(turn), length, number, partial(suite.turn_case, length, number, said)
            ),
            of_course,
        )
        for said, of_course in courses.items()
    ]


def _conversations(answers: Iterable[Answer]) -> list[Answer]:
    """One answer for the turns of each conversation that has all of them."""
    turns: dict[tuple[str, str], list[Answer]] = {}
    tasks = {turn_task(turn) for turn in range(TURNS)}
    for answer in answers:
        if answer.task in tasks:
            name = answer.case_name.replace(answer.task, LOOKUPS, 1)
            turns.setdefault((name, answer.way), []).append(answer)
    return [_joined(name, of_one) for (name, _), of_one in turns.items() if len(of_one) == TURNS]


def _joined(name: str, turns: Sequence[Answer]) -> Answer:
    in_order = sorted(turns, key=lambda answer: answer.task)
    steps = sum(answer.steps for answer in turns)
    streaming = sum(answer.streaming_share * answer.steps for answer in turns)
    return replace(
        in_order[0],
        case_name=name,
        task=LOOKUPS,
        token_ids=tuple(token for answer in in_order for token in answer.token_ids),
        text="\n".join(answer.text for answer in in_order),
        score=mean(answer.score for answer in turns if answer.score is not None),
        steps=steps,
        scanned_bytes=sum(answer.scanned_bytes for answer in turns),
        attended_bytes=sum(answer.attended_bytes for answer in turns),
        region_bytes=sum(answer.region_bytes for answer in turns),
        streaming_share=streaming / max(1, steps),
    )


def _scored_summaries(answers: Sequence[Answer]) -> list[Answer]:
    """Summaries and what was fed with those of `exact`, with scores; without `exact` none."""
    exact = {answer.case_name: answer for answer in answers if answer.way == EXACT}
    scored: list[Answer] = []
    for answer in answers:
        reference = exact.get(answer.case_name)
        if reference is None:
            continue
        if answer.way.endswith(_FORCED):
            scored.append(_as_tokens(answer, reference))
        else:
            score = 100 * rouge_l(answer.text, reference.text)
            scored.append(replace(answer, score=score))
        if answer.way == EXACT:
            scored.append(_as_tokens(answer, reference))
    return scored


def _as_tokens(answer: Answer, reference: Answer) -> Answer:
    """The same answer, scored by its tokens, as the way that was fed with those of `exact`."""
    return replace(
        answer,
        case_name=answer.case_name.replace(SUMMARY, SUMMARY_TOKENS_TASK, 1),
        task=SUMMARY_TOKENS_TASK,
        way=answer.way.removesuffix(_FORCED),
        score=100 * forced_agreement(reference.token_ids, answer.token_ids),
    )
