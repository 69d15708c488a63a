"""Head output errors as a node measures them while it serves, and what measuring costs a step.

    python -m fluxion_core.lab.benchmark.head_errors --model MODEL --texts "FILE,FILE"
    --policies "marginal(0.3),threshold(0.1)" --tokens 6000 --steps 500 --one-in 50 --json FILE

A prompt is the beginning of a text, and what follows in the text is what is decoded, so that all
policies read for the same tokens. All texts are decoded under all policies at once, by the CPU;
samples are taken as by a node (decode/head_errors.py), more of them if --one-in says so. True and
predicted errors are root mean squares over a policy's samples, with the ratio of mean squares and
its standard error; samples are taken as independent of each other.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fluxion_core.config.command_options import JsonOption, Texts
from fluxion_core.config.commands import Command, run_module, within
from fluxion_core.decode.head_errors import Floats, HeadErrorSampling
from fluxion_core.decode.host.attention import HostAttention
from fluxion_core.decode.host.decoder import HostDecoder
from fluxion_core.decode.host.step import HostStep
from fluxion_core.decode.step import HeadErrorSample, StepReads, StepRow
from fluxion_core.decode.work import StepWork
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.lab.benchmark.record_selections import RecordedText, read_text
from fluxion_core.lab.benchmark.report import describe_machine
from fluxion_core.lab.held_prompt import HeldPrompt, PromptMaker
from fluxion_core.lab.provenance import Provenance
from fluxion_core.models.decoder import Decoder
from fluxion_core.models.model_options import ModelOptions
from fluxion_core.models.weights import load_model
from fluxion_core.planning.planner import Planner
from fluxion_core.planning.planner_weights import PlannerWeights, shipped_planner_weights
from fluxion_core.planning.policy import Policy, parse_policy
from fluxion_core.pool.cpu_pool import CpuPool


@dataclass(frozen=True)
class PolicyErrors:
    """Errors of one policy, over all texts."""

    policy: str
    samples: int
    true: float
    """Root mean square."""
    predicted: float | None
    """None where nothing is predicted."""
    ratio: float | None
    """Mean squared error over the predicted one."""
    ratio_error: float | None
    """Standard error of that."""
    tail_share: float
    """Of the sum of squares, what the worst twentieth of the samples has."""


@dataclass(frozen=True)
class SamplingCost:
    """Cost of measuring, in the steps of all policies together."""

    one_in: int
    read_share: float
    """Bytes read for samples over those that attention read, windows included."""
    time_share: float
    """Time of sampling over the steps' time."""
    step_milliseconds: float
    """Mean."""
    milliseconds_a_sample: float


class _TimedSampling(HeadErrorSampling):
    """Sampling that knows how long it took."""

    seconds: float = 0.0

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started

    def begin_step(self, rows: Sequence[StepRow], regions: Sequence[range]) -> None:
        with self._timed():
            super().begin_step(rows, regions)

    def measure(self, layer: int, work: StepWork, query: Floats, output: Floats) -> None:
        with self._timed():
            super().measure(layer, work, query, output)

    def end_step(self, reads: Sequence[StepReads]) -> list[StepReads]:
        with self._timed():
            return super().end_step(reads)


@dataclass
class _Run:
    samples: dict[Policy, list[HeadErrorSample]] = field(default_factory=dict)
    read_bytes: int = 0
    sampled_bytes: int = 0
    step_seconds: float = 0.0
    steps: int = 0

    def add(self, rows: Sequence[StepRow], reads: Sequence[StepReads]) -> None:
        for row, read in zip(rows, reads, strict=True):
            tokens, geometry = row.sequence.num_tokens, row.sequence.store.geometry
            self.read_bytes += read.total_bytes - read.region_bytes + tokens * geometry.token_bytes
            self.sampled_bytes += sum(sample.read_bytes for sample in read.head_errors)
            self.samples.setdefault(row.policy, []).extend(read.head_errors)


def measure_head_errors(
    decoder: Decoder,
    planner: Planner,
    texts: Sequence[RecordedText],
    held: Sequence[HeldPrompt],
    policies: Sequence[Policy],
    *,
    one_in: int,
) -> tuple[list[PolicyErrors], SamplingCost]:
    """Decode every text under every policy, all at once.

    Args:
        decoder: the model, on the CPU; it cannot be used any more.
        planner: of the model.
        texts: their prompts are of one length, and so is what follows.
        held: their prompts' KV.
        policies: other than exact.
        one_in: see HeadErrorSampling.
    """
    geometry, pool = held[0].geometry, CpuPool(torch.get_num_threads())
    steps = len(texts[0].following)
    slabs = geometry.slabs_for(len(texts[0].prompt) + steps) * len(texts)
    slabs += (geometry.slabs_for(steps) + 2) * len(texts) * len(policies)
    store = HostKvStore(geometry, slabs * (geometry.slab_bytes + 4096), model_key=b"")
    sampling = _TimedSampling(geometry, decoder.config.num_heads, pool, one_in=one_in)
    attention = HostAttention(
        store,
        WindowSpec(),
        num_heads=decoder.config.num_heads,
        pool=pool,
        planner=planner,
        sampling=sampling,
    )
    step = HostStep(HostDecoder(decoder, pool), attention)
    decoded = []
    for policy in policies:
        for text, prompt in zip(texts, held, strict=True):
            sequence = prompt.store_into(store, text.prompt, steps)
            state = planner.new_state(prompt.profiles)
            decoded.append((text, StepRow(sequence, step.join(sequence), 0, policy, state)))
    measured = _Run()
    for number in range(steps):
        rows = [replace(row, token_id=text.following[number]) for text, row in decoded]
        started = time.perf_counter()
        _, reads = step.run(rows)
        measured.step_seconds += time.perf_counter() - started
        measured.steps += 1
        measured.add(rows, reads)
    figures = [_errors(str(policy), measured.samples[policy]) for policy in policies]
    return figures, _cost(one_in, measured, sampling.seconds)


def _cost(one_in: int, measured: _Run, sampling_seconds: float) -> SamplingCost:
    count = sum(map(len, measured.samples.values()))
    return SamplingCost(
        one_in,
        measured.sampled_bytes / measured.read_bytes,
        sampling_seconds / measured.step_seconds,
        measured.step_seconds / measured.steps * 1e3,
        sampling_seconds / max(1, count) * 1e3,
    )


def _errors(policy: str, samples: Sequence[HeadErrorSample]) -> PolicyErrors:
    true = np.array([sample.squared_error for sample in samples])
    if not len(true):
        return PolicyErrors(policy, 0, 0.0, None, None, None, 0.0)
    worst = np.sort(true)[-max(1, len(true) // 20) :]
    tail_share = float(worst.sum() / true.sum()) if true.any() else 0.0
    root = math.sqrt(true.mean())
    squares = [sample.predicted for sample in samples if sample.predicted is not None]
    if not any(squares):
        return PolicyErrors(policy, len(true), root, None, None, None, tail_share)
    predicted = np.array(squares)
    ratio = true.mean() / predicted.mean()
    # Of a ratio of means: that of the residuals, over the mean below.
    residuals = true - ratio * predicted
    error = residuals.std() / math.sqrt(len(true)) / predicted.mean()
    aim = math.sqrt(predicted.mean())
    return PolicyErrors(policy, len(true), root, aim, float(ratio), float(error), tail_share)


@dataclass(frozen=True, kw_only=True)
class HeadErrorsBench(JsonOption, ModelOptions, Command):
    """Measure head output errors as a node does while it serves, and what measuring costs."""

    texts: Texts
    """Files of texts; two with + between them for one that changes its topic."""
    policies: Texts
    """By name; other than exact."""
    tokens: Annotated[int, within(1)] = 6000
    """Of each prompt."""
    steps: Annotated[int, within(1)] = 500
    """After each prompt."""
    one_in: Annotated[int, within(1)] = 1000
    """Of so many bytes that attention reads, one is read for samples."""
    weights: bool = True
    """Whether the model's shipped weights are used, if it has some."""
    bfloat16: bool = False
    """Whether the model is computed in bfloat16 in place of float32: half the memory."""

    def __call__(self) -> None:
        """Print a table; keep the figures."""
        path = self.locate()
        tokenizer = Tokenizer.load(path)
        texts = [read_text(name, tokenizer, self.tokens, self.steps) for name in self.texts]
        dtype = torch.bfloat16 if self.bfloat16 else torch.float32
        model = load_model(path, device=torch.device("cpu"), dtype=dtype)
        config = model.config
        geometry = KvGeometry(config.num_layers, config.num_kv_heads, config.head_dim)
        maker = PromptMaker(model.decoder, geometry)
        held = [maker.make(text.prompt, profile_window=WindowSpec()) for text in texts]
        shipped = shipped_planner_weights(model.revision_hash) if self.weights else None
        planner = Planner(
            shipped or PlannerWeights.training_free(config.num_layers, config.num_heads),
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        )
        figures, cost = measure_head_errors(
            model.decoder,
            planner,
            texts,
            held,
            [parse_policy(name) for name in self.policies],
            one_in=self.one_in,
        )
        _print(self.console(width=140), figures, cost)
        fingerprint = planner.weights.fingerprint or "training-free"
        self.write(
            {
                "about": Provenance.here(model.name, model.revision_hash, fingerprint).as_json(),
                "machine": describe_machine(),
                "texts": [text.name for text in texts],
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": self.tokens,
                "steps": self.steps,
                "figures": [asdict(figure) for figure in figures],
                "cost": asdict(cost),
            }
        )


def _print(console: Console, figures: Sequence[PolicyErrors], cost: SamplingCost) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("policy", "samples", "true", "predicted", "ratio of squares", "worst 5 %"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for one in figures:
        aims = one.predicted is not None
        table.add_row(
            one.policy,
            f"{one.samples:,}",
            f"{one.true:.3f}",
            f"{one.predicted:.3f}" if aims else "",
            f"{one.ratio:.2f} +- {one.ratio_error:.2f}" if aims else "",
            f"{one.tail_share:.0%}",
        )
    console.print(table)
    console.print(
        f"one byte in {cost.one_in:,}: {cost.read_share:.3%} of attention's bytes, "
        f"{cost.time_share:.3%} of the steps' time ({cost.step_milliseconds:.1f} ms each), "
        f"{cost.milliseconds_a_sample:.2f} ms a sample",
        highlight=False,
    )


if __name__ == "__main__":
    sys.exit(run_module(HeadErrorsBench))
