"""All that is published of a model's levels, through one body of a decode step, in one command.

RULER on essays, agreement with `exact` and divergence from it, with one model in memory. Journals
are kept: the same command goes on where it was stopped. The host's body and a device's may be
measured beside each other, by two processes on CPUs of their own:

    python -m fluxion_core.lab.evaluation.essays TEXTS
    taskset -c 0-10 python -m fluxion_core.lab.evaluation.measure --step host \\
        --texts TEXTS --output OUT &
    taskset -c 11-15 python -m fluxion_core.lab.evaluation.measure --step device \\
        --texts TEXTS --output OUT; wait
    python -m fluxion_core.lab.evaluation.measure_tables OUT
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fluxion_core.config.command_options import Numbers
from fluxion_core.config.commands import Command, run_module, within
from fluxion_core.errors import ConfigError
from fluxion_core.lab.evaluation.evaluate import evaluate
from fluxion_core.lab.evaluation.options import Benchmark, Device, Dtype, EvaluationOptions, Step
from fluxion_core.lab.evaluation.session import EvaluationModel
from fluxion_core.lab.evaluation.work import Answer
from fluxion_core.models.model_options import ModelOptions

SEED = 2026

LEVELS = ("exact", "accurate", "balanced", "fast", "fixed(16, 5 %)")

CURVE = (
    *LEVELS,
    *("marginal(0.03)", "marginal(3)", "fixed(16, 2 %)", "fixed(16, 10 %)", "fixed(16, 100 %)"),
)
"""Policies of the curve of divergence over bytes. The last one reads everything: it diverges by the
order of sums, and in bfloat16 by their rounding, which all others have too."""

RULER_TASKS = ("niah_single_1", "niah_single_2", "niah_multikey_1")
"""Those that SmolLM2-135M can do."""

PROGRESS_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Measurement(ModelOptions, Command):
    """Measure a model's levels: RULER, agreement and divergence, resumed where it was stopped."""

    texts: Path
    """Directory that `essays` has filled: essays and documents."""
    output: Path
    """Directory of journals and results."""
    step: Step = "host"
    """What decodes: the CPUs alone, or a CUDA device with them."""
    dtype: Dtype = "auto"
    """Of the model; auto is float32 for step host, bfloat16 for step device."""
    device: Device = "auto"
    """Where prompts are computed."""
    cases: Annotated[int, within(1)] = 50
    """Of each task and length of RULER."""
    lengths: Numbers = (4096, 8192)
    """Of RULER, tokens of prompt and answer together."""
    documents: Annotated[int, within(1)] = 20
    """Continued, and fed."""
    document_tokens: Annotated[int, within(256)] = 7168
    """Of each document, what is generated or fed included."""
    seconds: Annotated[float, within(0)] = 0.0
    """Begin no case after this, s, and leave the rest for a later call; 0 for no limit."""
    commit: str = ""
    """Of the code, where it does not lie in a repository."""

    def __call__(self) -> None:
        """Run all three; a line of progress now and then on stderr."""
        self.output.mkdir(parents=True, exist_ok=True)
        until = time.monotonic() + self.seconds if self.seconds else None
        model: EvaluationModel | None = None
        for benchmark in ("divergence", "agreement", "ruler"):
            left = 0.0 if until is None else until - time.monotonic()
            if until is not None and left <= 0:
                raise ConfigError(f"{self.seconds:g} s are over before {benchmark}: call it again")
            options = self._options(benchmark, left)
            model = model or EvaluationModel.load(options)
            print(evaluate(options, _Progress(self.step), model), flush=True)

    def _options(self, benchmark: Benchmark, seconds: float) -> EvaluationOptions:
        stem = self.output / f"{benchmark}-{self.step}"
        is_ruler = benchmark == "ruler"
        return EvaluationOptions(
            benchmark,
            model=self.model,
            models_dir=self.models_dir,
            lengths=self.lengths if is_ruler else (self.document_tokens,),
            cases=self.cases if is_ruler else self.documents,
            tasks=RULER_TASKS if is_ruler else (),
            policies=CURVE if benchmark == "divergence" else LEVELS,
            seed=SEED,
            chat=False,
            data=None if is_ruler else self.texts / "documents",
            prose=self.texts / "essays" if is_ruler else None,
            pilot_cases=0,
            new_tokens=64 if benchmark == "divergence" else 128,
            device=self.device,
            step=self.step,
            dtype=self.dtype,
            stop_after_seconds=seconds,
            journal=stem.with_suffix(".jsonl"),
            resume=stem.with_suffix(".jsonl").exists(),
            json=stem.with_suffix(".json"),
            markdown=stem.with_suffix(".md"),
            commit=self.commit,
        )


class _Progress:
    """Prints how far a benchmark is, now and then."""

    def __init__(self, step: str) -> None:
        self._step = step
        self._last = 0.0

    def __call__(self, done: int, total: int, answer: Answer) -> None:
        now = time.monotonic()
        if done == total or now - self._last > PROGRESS_SECONDS:
            self._last = now
            line = f"{self._step}: {done}/{total} {answer.case_name} {answer.way}"
            print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_module(Measurement))
