"""Run one evaluation and write what it showed: JSON, Markdown, a picture."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from fluxion_core.lab.evaluation import render
from fluxion_core.lab.evaluation.agreement import run_agreement
from fluxion_core.lab.evaluation.collect_run import run_collect
from fluxion_core.lab.evaluation.divergence import run_divergence
from fluxion_core.lab.evaluation.files_run import run_files
from fluxion_core.lab.evaluation.options import EvaluationOptions
from fluxion_core.lab.evaluation.session import EvaluationModel, OnAnswer, Session
from fluxion_core.lab.evaluation.suite_run import run_ruler
from fluxion_core.lab.machine import describe_machine
from fluxion_core.lab.plots.evaluation import draw_agreement, draw_divergence, draw_scores
from fluxion_core.lab.provenance import Provenance

_TITLES = {
    "ruler": "RULER",
    "collect": "Tasks that collect",
    "longbench": "LongBench",
    "leval": "L-Eval",
    "agreement": "Greedy agreement with exact",
    "divergence": "Divergence from exact",
}

_SCORED = {"ruler": run_ruler, "collect": run_collect}


def evaluate(
    options: EvaluationOptions, on_answer: OnAnswer, model: EvaluationModel | None = None
) -> str:
    """Run it; writes the files that the options name.

    Args:
        options: of the run.
        on_answer: called after each answer.
        model: that was loaded for such options; loaded if None.

    Returns:
        The report in Markdown.

    Raises:
        FluxionError: something that is asked for is not there or cannot be used.
    """
    started = time.perf_counter()
    _check_writable(options.json, options.markdown, options.plot)
    model = model or EvaluationModel.load(options)
    title = f"{_TITLES[options.benchmark]}, {model.name}"
    draw: Callable[[Path], None]
    content: dict[str, object]
    if options.benchmark == "divergence":
        compared, session = run_divergence(model, options, on_answer)
        settings = describe(session, started)
        text = render.divergence_markdown(title, compared, settings, session.notes)
        draw = partial(draw_divergence, title, compared)
        content = {"rows": [asdict(row) for row in compared], "notes": session.notes}
    elif options.benchmark == "agreement":
        rows, session = run_agreement(model, options, on_answer)
        settings = describe(session, started)
        text = render.agreement_markdown(title, rows, settings, session.notes)
        draw = partial(draw_agreement, title, rows)
        content = {"rows": [asdict(row) for row in rows], "notes": session.notes}
    else:
        run = _SCORED.get(options.benchmark, run_files)
        report, session = run(model, options, on_answer)
        settings = describe(session, started)
        text = render.markdown(title, report, settings)
        draw = partial(draw_scores, title, report)
        content = {"report": asdict(report)}
    gpu = torch.cuda.get_device_name() if options.device_name == "cuda" else ""
    about = Provenance.here(
        model.name,
        model.revision_hash,
        model.weights.fingerprint,
        commit=options.commit,
        gpu=gpu,
    )
    whole = {"title": title, "about": about.as_json(), "settings": settings, **content}
    options.write(whole)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    if options.plot:
        draw(options.plot)
    return text


def describe(session: Session, started: float) -> dict[str, str]:
    """Facts that a reader must know of a run.

    Args:
        session: that has run.
        started: time.perf_counter() at its start.
    """
    machine = describe_machine(session.options.commit)
    done = session.statistics
    return session.settings | {
        "machine": ", ".join(f"{name} {value}" for name, value in machine.items()),
        "prompts computed on": session.options.device_name,
        "policies": ", ".join(
            way.name if way.name == str(way.policy) else f"{way.name} = {way.policy}"
            for way in session.ways
        ),
        "lengths": "prompt and answer together have at most that many of the model's tokens",
        "this run": f"{time.perf_counter() - started:.0f} s: {done.tokens} tokens in {done.steps} "
        f"steps of {done.step_seconds:.0f} s, {done.prefills} prompts in "
        f"{done.prefill_seconds:.0f} s",
    }


def _check_writable(*paths: Path | None) -> None:
    """Make folders now: a run of hours must not end without its report."""
    for path in paths:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
