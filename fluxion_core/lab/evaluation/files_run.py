"""LongBench and L-Eval: all policies side by side on cases of local files."""

from __future__ import annotations

import hashlib
from contextlib import closing

from fluxion_core.errors import ConfigError
from fluxion_core.lab.evaluation.case import Case
from fluxion_core.lab.evaluation.options import EvaluationOptions
from fluxion_core.lab.evaluation.report import Report, summarize
from fluxion_core.lab.evaluation.session import CaseSource, EvaluationModel, OnAnswer, Session
from fluxion_core.lab.evaluation.tasks import leval, longbench

ABLE_SCORE = 5.0
"""A task counts from here: F1 and ROUGE-L of good answers are far below 100."""


def run_files(
    model: EvaluationModel, options: EvaluationOptions, on_answer: OnAnswer
) -> tuple[Report, Session]:
    """Answer and summarise.

    Raises:
        ConfigError: a task's file is not there or damaged; tasks can be named to leave others out.
    """
    is_longbench = options.benchmark == "longbench"
    known = tuple(longbench.TASKS if is_longbench else leval.TASKS)
    make = longbench.longbench_cases if is_longbench else leval.leval_cases
    context = model.config.context_tokens
    cases = [
        case
        for name in options.tasks or known
        for case in make(
            name,
            options.data,
            model.encoder,
            context_tokens=context,
            minimum_tokens=options.minimum_tokens,
            count=options.cases,
        )
    ]
    if not cases:
        raise ConfigError(f"no case has a prompt of {options.minimum_tokens} tokens or more")
    settings = {
        "context": f"{context} tokens; what is too long loses its middle",
        "minimum tokens": str(options.minimum_tokens),
        "cases fingerprint": _fingerprint(cases),
    }
    longest = max(len(case.prompt_token_ids) + case.max_new_tokens for case in cases)
    session = Session(model, options, settings, on_answer, longest)
    session.notes.append("instructions are our own: compare policies, not published tables")
    with closing(session):
        session.answer([_source(case) for case in cases], session.ways)
    names = {case.name for case in cases}
    answers = [a for a in session.journal.answers.values() if a.case_name in names]
    ways = [way.name for way in session.ways]
    report = summarize(answers, ways, session.notes, able_score=ABLE_SCORE, seed=options.seed)
    return report, session


def _source(case: Case) -> CaseSource:
    return CaseSource(case.task, case.length, case.number, lambda: case)


def _fingerprint(cases: list[Case]) -> str:
    """Of what is in the files, as far as it is asked."""
    names = "\n".join(f"{case.name} {case.answers}" for case in sorted(cases, key=lambda c: c.name))
    return hashlib.sha256(names.encode()).hexdigest()[:16]
