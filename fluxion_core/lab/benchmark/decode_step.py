"""Time per output token of a real model on the CPU, policies and transformers side by side.

One prompt is prefilled once; every policy then decodes from its own copy of the same KV, and
transformers (where it is installed) from an ordinary cache that holds the same values. They take
turns, token by token, so that a noisy machine is noisy for all. Beside each figure stands its
limit: the step without attention, plus the bytes it read at the rate at which this machine reads
memory.

A step samples its row as a served one does (`STEP_SAMPLING`), within its time. The text goes on
with the likeliest token all the same, so that all ways decode the same one; transformers takes that
and samples nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fluxion_core.decode.host.attention import HostAttention
from fluxion_core.decode.host.decoder import HostDecoder
from fluxion_core.decode.host.step import HostStep
from fluxion_core.decode.step import StepRow
from fluxion_core.errors import ConfigError
from fluxion_core.generation.sampling import SamplingParams, TokenSampler, sample_rows
from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.kernels import _native
from fluxion_core.kvstore.digest_index import gather_kv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.lab.benchmark.report import describe_machine
from fluxion_core.lab.benchmark.sampling import STEP_SAMPLING, step_samplers
from fluxion_core.lab.held_prompt import PromptMaker
from fluxion_core.lab.plots.bars import draw_bars
from fluxion_core.lab.provenance import NONE, Provenance
from fluxion_core.machine.cpus import usable_cpus
from fluxion_core.models.decoder import Decoder
from fluxion_core.planning.planner import PlanNanoseconds, Planner, PlannerState
from fluxion_core.planning.planner_weights import PlannerWeights
from fluxion_core.planning.policy import Policy, PredictedPolicy, parse_policy
from fluxion_core.pool.cpu_pool import CpuPool

WARM_UP_STEPS = 2


@dataclass(frozen=True)
class StepFigure:
    """One way to decode a token."""

    name: str
    milliseconds: float
    """Median step."""
    attention_milliseconds: float
    """Median of step minus the step without attention of the same turn."""
    read_bytes: float
    """Digests and KV of the retrieval region, per token."""
    limit_milliseconds: float
    """Step without attention, plus all bytes at the sequential read rate; 0 for no limit."""
    predict_milliseconds: float = 0.0
    """Of the step, for predicting head profiles; median. 0 where nothing is predicted."""
    select_milliseconds: float = 0.0
    """Of the step, for choosing plans from profiles."""
    scan_milliseconds: float = 0.0
    """Scanning the coarsest digests for the prediction, summed over threads."""
    region_share: float = 0.0
    """Bytes read of the region's, per token."""
    sampling_milliseconds: float = 0.0
    """Of the step, for sampling its row; median. 0 where nothing is sampled."""

    @property
    def plan_share(self) -> float:
        """Predictor and selector's share of the step."""
        return (self.predict_milliseconds + self.select_milliseconds) / self.milliseconds


def run_decode_step_bench(
    console: Console,
    decoder: Decoder,
    token_ids: Sequence[int],
    *,
    model: str = NONE,
    revision: str = NONE,
    steps: int = 20,
    policies: Sequence[str] = ("exact", "fixed(16, 5 %)"),
    transformers_model: torch.nn.Module | None = None,
    digest_bits: int = 16,
    weights: PlannerWeights | None = None,
) -> dict[str, object]:
    """Measure; print a table, return everything as plain data.

    Args:
        console: where the table goes.
        decoder: the model, float32 on the CPU; its weights are taken (HostDecoder).
        token_ids: the prompt.
        model, revision: that the decoder is of, for the report.
        steps: tokens that count, after two that do not.
        policies: by name.
        transformers_model: the same model in transformers, or None to leave it out.
        digest_bits: of the store.
        weights: for policies that predict; None for the training-free mode.

    Raises:
        ConfigError: no policy, or one that does not exist.
    """
    chosen = [parse_policy(name) for name in policies]
    if not chosen:
        raise ConfigError("no policies to measure")
    machine = describe_machine()
    console.print(
        f"[bold]decode step[/bold], {len(token_ids):,} tokens, batch 1; {machine}", highlight=False
    )
    with _torch_threads(len(usable_cpus())):
        bench = _Bench(
            decoder, token_ids, chosen, steps + WARM_UP_STEPS, digest_bits, weights=weights
        )
        console.print(f"prefilled in {bench.prefill_seconds:.1f} s", highlight=False)
        rows = _take_turns(bench, chosen, transformers_model, steps)
        figures = _figures(bench, chosen, rows)
        peace = _peace_with_torch(bench)
    fingerprint = bench.planner.weights.fingerprint
    report: dict[str, object] = {
        "about": Provenance.here(model, revision, fingerprint).as_json(),
        "machine": machine | {"omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset")},
        "tokens": len(token_ids),
        "steps": steps,
        "sampling": STEP_SAMPLING,
        "planner": bench.planner.mode,
        "read_gigabytes_per_second": bench.read_rate / 1e9,
        "figures": [asdict(figure) | {"plan_share": figure.plan_share} for figure in figures],
        "tokens_equal": _tokens_equal(rows),
        "peace_with_torch": peace,
    }
    _print(console, report, figures)
    return report


def plot(report: dict[str, object], path: Path) -> None:
    """Bars of milliseconds per token."""
    figures = report["figures"]
    assert isinstance(figures, list)
    draw_bars(
        path,
        f"Time per output token, {report['tokens']:,} tokens",
        [(figure["name"], figure["milliseconds"]) for figure in figures],
        unit="ms",
    )


@dataclass
class _Turn:
    """One way's step of one turn."""

    seconds: float
    token_id: int
    read_bytes: int = 0
    window_bytes: int = 0
    region_bytes: int = 0
    plan: PlanNanoseconds = field(default_factory=PlanNanoseconds)
    sampling_seconds: float = 0.0


class _Bench:
    """A decoder, its KV in a store, and one sequence for each policy."""

    def __init__(
        self,
        decoder: Decoder,
        token_ids: Sequence[int],
        policies: Sequence[Policy],
        new_tokens: int,
        digest_bits: int,
        *,
        weights: PlannerWeights | None,
    ) -> None:
        config = decoder.config
        self.num_prompt_tokens = len(token_ids)
        self.geometry = KvGeometry(
            config.num_layers, config.num_kv_heads, config.head_dim, digest_bits=digest_bits
        )
        self.window = WindowSpec()
        predicts = any(isinstance(policy, PredictedPolicy) for policy in policies)
        start = time.perf_counter()
        prompt = PromptMaker(decoder, self.geometry).make(
            token_ids, profile_window=self.window if predicts else None
        )
        self.prefill_seconds = time.perf_counter() - start
        self.first_token = prompt.first_token_id
        slabs = self.geometry.slabs_for(len(token_ids) + new_tokens) * len(policies)
        self.store = HostKvStore(
            self.geometry, slabs * (self.geometry.slab_bytes + 4096), model_key=b"", populate=True
        )
        # Different first ids, so that no two sequences share slabs.
        self.sequences = [
            prompt.store_into(self.store, [index, *token_ids[1:]], new_tokens)
            for index in range(len(policies))
        ]
        self.pool = CpuPool()
        self.planner = Planner(
            weights
            or PlannerWeights.training_free(config.num_layers, config.num_heads, digest_bits),
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        )
        self.states: list[PlannerState | None] = [None] * len(policies)
        if predicts:
            self.states = [self.planner.new_state(prompt.profiles) for _ in policies]
        self.attention = HostAttention(
            self.store,
            self.window,
            num_heads=config.num_heads,
            pool=self.pool,
            planner=self.planner,
        )
        self.decoder = HostDecoder(decoder, self.pool)
        self._step = HostStep(self.decoder, self.attention)
        self.samplers = step_samplers(1)
        self.read_rate = self._measure_read()

    def step(self, row: int, policy: Policy, token_id: int) -> _Turn:
        """Decode one token of a sequence."""
        sequence = self.sequences[row]
        position = sequence.num_tokens
        of_step = StepRow(sequence, 0, token_id, policy, self.states[row])
        start = time.perf_counter()
        logits, (reads,) = self._step.run([of_step])
        sampling_seconds = self._sample(logits)
        seconds = time.perf_counter() - start
        outside = position + 1 - len(self.window.retrieval_region(position + 1))
        return _Turn(
            seconds,
            _likeliest(logits),
            reads.total_bytes,
            outside * self.geometry.token_bytes,
            reads.region_bytes,
            self.attention.plan_nanoseconds,
            sampling_seconds,
        )

    def step_without_attention(self, token_id: int) -> _Turn:
        """The same step with attention that does nothing."""
        start = time.perf_counter()
        with torch.inference_mode():
            tokens, positions = torch.tensor([token_id]), torch.tensor([self.num_prompt_tokens])
            logits = self.decoder.logits(self.decoder(tokens, positions, _NoAttention()))
        sampling_seconds = self._sample(logits)
        seconds = time.perf_counter() - start
        return _Turn(seconds, _likeliest(logits), sampling_seconds=sampling_seconds)

    def _sample(self, logits: Tensor) -> float:
        start = time.perf_counter()
        sample_rows(logits, self.samplers, self.pool)
        return time.perf_counter() - start

    def _measure_read(self) -> float:
        """Bytes per second of all CPUs over the store's KV."""
        slabs = range(self.store.num_slabs)
        piece = 65_536
        inside = np.arange(0, self.geometry.kv_bytes // piece * piece, piece)
        starts = np.asarray([self.store.slab_address(slab) for slab in slabs])
        pieces = np.ascontiguousarray((starts[:, None] + inside).ravel())
        seconds = [_native.read_seconds(pieces, piece, usable_cpus()) for _ in range(5)]
        return len(pieces) * piece / median(seconds)


def _likeliest(logits: Tensor) -> int:
    """The token that greedy decoding goes on with, of [1, vocab] logits."""
    return TokenSampler(SamplingParams()).sample(logits[0])


class _NoAttention:
    """Attention port that does nothing."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See AttentionPort."""
        del layer, key, value
        return query


def _take_turns(
    bench: _Bench,
    policies: Sequence[Policy],
    transformers_model: torch.nn.Module | None,
    steps: int,
) -> list[dict[str, _Turn]]:
    """Every way's step, turn by turn; the warm-up turns are left out."""
    ways: dict[str, Callable[[int], _Turn]] = {
        "without attention": bench.step_without_attention,
        **{str(policy): partial(bench.step, row, policy) for row, policy in enumerate(policies)},
    }
    if transformers_model is not None:
        ways["transformers"] = _transformers_step(bench, transformers_model)
    tokens = dict.fromkeys(ways, bench.first_token)
    turns = []
    for _ in range(WARM_UP_STEPS + steps):
        turn = {name: way(tokens[name]) for name, way in ways.items()}
        tokens = {name: turn[name].token_id for name in ways}
        turns.append(turn)
    return turns[WARM_UP_STEPS:]


def _transformers_step(bench: _Bench, model: torch.nn.Module) -> Callable[[int], _Turn]:
    """A step of transformers over its ordinary cache, filled with the same KV."""
    from transformers import DynamicCache

    cache = DynamicCache()
    sequence, geometry = bench.sequences[0], bench.geometry
    for layer in range(geometry.num_layers):
        heads = [gather_kv(sequence, layer, head) for head in range(geometry.num_kv_heads)]
        keys = torch.stack([key for key, _ in heads])[None].float()
        values = torch.stack([value for _, value in heads])[None].float()
        cache.update(keys, values, layer)

    def step(token_id: int) -> _Turn:
        start = time.perf_counter()
        with torch.inference_mode():
            output = model(torch.tensor([[token_id]]), past_key_values=cache, use_cache=True)
            token = int(output.logits[0, -1].argmax())
        return _Turn(time.perf_counter() - start, token)

    return step


def _figures(
    bench: _Bench, policies: Sequence[Policy], turns: list[dict[str, _Turn]]
) -> list[StepFigure]:
    names = [str(policy) for policy in policies]
    dense = median(turn["without attention"].seconds for turn in turns)
    figures = []
    for name in turns[0]:
        own = [turn[name] for turn in turns]
        seconds = median(turn.seconds for turn in own)
        read = median(turn.read_bytes for turn in own)
        all_bytes = read + median(turn.window_bytes for turn in own)
        attention = median(t[name].seconds - t["without attention"].seconds for t in turns)
        limit = dense + all_bytes / bench.read_rate if name in names else 0.0
        figures.append(
            StepFigure(
                name,
                seconds * 1e3,
                attention * 1e3,
                read,
                limit * 1e3,
                median(turn.plan.predict for turn in own) / 1e6,
                median(turn.plan.select for turn in own) / 1e6,
                median(turn.plan.scan for turn in own) / 1e6,
                read / max(1, median(turn.region_bytes for turn in own)),
                median(turn.sampling_seconds for turn in own) * 1e3,
            )
        )
    return figures


def _tokens_equal(turns: list[dict[str, _Turn]]) -> bool | None:
    """Whether `exact` gave the tokens of transformers; None if one of them did not run."""
    if not {"exact", "transformers"} <= turns[0].keys():
        return None
    return all(turn["exact"].token_id == turn["transformers"].token_id for turn in turns)


def _peace_with_torch(bench: _Bench, *, repeats: int = 30) -> dict[str, float]:
    """A round of the pool straight after a threaded torch product, and after a rest. Microseconds.

    Threads that spin after their product would take the cores from the pool's.
    """
    config = bench.decoder.config
    sequence, geometry = bench.sequences[0], bench.geometry
    query = torch.randn(1, config.num_heads, config.head_dim)
    key = torch.zeros(1, config.num_kv_heads, config.head_dim)
    square = torch.randn(1024, 1024)

    def round_seconds(before: Callable[[], object]) -> float:
        bench.attention.begin_step([StepRow(sequence, 0, 0, parse_policy("exact"))])
        before()
        start = time.perf_counter()
        # What it appends is overwritten by the next round: the step is never ended.
        bench.attention.attend(geometry.num_layers - 1, query, key, key)
        return time.perf_counter() - start

    seconds: dict[str, list[float]] = {"after_product": [], "after_rest": []}
    for _ in range(repeats):
        seconds["after_product"].append(round_seconds(lambda: square @ square))
        seconds["after_rest"].append(round_seconds(lambda: time.sleep(0.005)))
    return {name: median(values) * 1e6 for name, values in seconds.items()}


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _print(console: Console, report: dict[str, object], figures: list[StepFigure]) -> None:
    table = Table(box=None, pad_edge=False)
    columns = (
        "way",
        "ms a token",
        "attention ms",
        "region MB",
        "of region",
        "limit ms",
        "of limit",
    )
    for column in (*columns, "predict ms", "select ms", "of step"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for figure in figures:
        has_limit, plans = figure.limit_milliseconds > 0, figure.predict_milliseconds > 0
        table.add_row(
            figure.name,
            f"{figure.milliseconds:.1f}",
            f"{figure.attention_milliseconds:.1f}",
            f"{figure.read_bytes / 1e6:.1f}" if has_limit else "",
            f"{figure.region_share:.3f}" if has_limit else "",
            f"{figure.limit_milliseconds:.1f}" if has_limit else "",
            f"{figure.milliseconds / figure.limit_milliseconds:.2f}" if has_limit else "",
            f"{figure.predict_milliseconds:.2f}" if plans else "",
            f"{figure.select_milliseconds:.2f}" if plans else "",
            f"{figure.plan_share * 100:.1f} %" if plans else "",
        )
    console.print(table)
    sampled = max(figure.sampling_milliseconds for figure in figures)
    console.print(
        f"each step samples its row ({report['sampling']}): up to {sampled:.2f} ms of it; the text "
        f"goes on with the likeliest token, and transformers takes that alone",
        highlight=False,
    )
    equal = report["tokens_equal"]
    if equal is not None:
        console.print(f"tokens of exact and of transformers: {'equal' if equal else 'DIFFERENT'}")
    peace = report["peace_with_torch"]
    assert isinstance(peace, dict)
    console.print(
        f"a round of the pool: {peace['after_product']:.0f} us straight after a threaded product, "
        f"{peace['after_rest']:.0f} us after a rest",
        highlight=False,
    )
