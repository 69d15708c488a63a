"""Run one evaluation and write what it showed: JSON, Markdown, a picture."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

from fluxion_core.benchmark.report import describe_machine
from fluxion_core.evaluation import render
from fluxion_core.evaluation.options import EvaluationOptions
from fluxion_core.evaluation.report import Report
from fluxion_core.evaluation.ruler_run import run_ruler
from fluxion_core.evaluation.session import EvaluationModel, OnAnswer, Session

_TITLES = {"ruler": "RULER", "longbench": "LongBench", "leval": "L-Eval"}


def evaluate(options: EvaluationOptions, on_answer: OnAnswer) -> str:
    """Run it; writes the files that the options name.

    Returns:
        The report in Markdown.

    Raises:
        FluxionError: something that is asked for is not there or cannot be used.
    """
    started = time.perf_counter()
    model = EvaluationModel.load(options)
    report, session = run_ruler(model, options, on_answer)
    title = f"{_TITLES[options.benchmark]}, {model.loaded.name}"
    settings = describe(session) | {"seconds": f"{time.perf_counter() - started:.0f}"}
    text = render.markdown(title, report, settings)
    if options.json:
        content = {"title": title, "settings": settings, "report": asdict(report)}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    if options.markdown:
        options.markdown.write_text(text)
    if options.plot:
        _draw(title, report, options)
    return text


def describe(session: Session) -> dict[str, str]:
    """What a reader must know of a run."""
    machine = describe_machine()
    done = session.statistics
    steps, tokens = sum(s.steps for s in done), sum(s.tokens for s in done)
    options = session.options
    return session.settings | {
        "machine": ", ".join(f"{name} {value}" for name, value in machine.items()),
        "prompts computed on": options.device_name,
        "policies": ", ".join(
            way.name if way.name == str(way.policy) else f"{way.name} = {way.policy}"
            for way in session.ways
        ),
        "lengths": "prompt and answer together have at most that many of the model's tokens",
        "this run": f"{steps} steps, {tokens} tokens, "
        f"{sum(s.prefills for s in done)} prompts in {sum(s.prefill_seconds for s in done):.0f} s",
    }


def _draw(title: str, report: Report, options: EvaluationOptions) -> None:
    assert options.plot is not None
    render.draw(title, report, options.plot)
