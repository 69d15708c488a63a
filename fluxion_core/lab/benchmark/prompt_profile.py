"""A follow-up's profile beside a stream: how long each slice keeps the stream from its next token.

python -m fluxion_core.lab.benchmark.prompt_profile --shape llama-3.1-8b --layers 2 --tokens 32768

A stream with `exact` decodes on the CPU, as long as the prompt that is profiled between its steps,
as the decode engine does it. Weights, KV and queries are random. Beside it, what the estimator of
prefill nodes takes for a layer, with a copy of the KV in float32, on one thread of torch. CPU
seconds are the process's, all threads. With `--prefill` also what prefill takes for a layer without
its profile, so that the profile's share can be told.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Annotated

import torch

from fluxion_core.config.command_options import JsonOption, Numbers
from fluxion_core.config.commands import Command, run_module, within
from fluxion_core.decode.bodies import step_for
from fluxion_core.decode.profiling import PromptProfiling
from fluxion_core.decode.step import StepRow
from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.kvstore.digest_index import gather_kv
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.lab.benchmark.model_shapes import (
    fill_sequences,
    random_decoder,
    shape_named,
)
from fluxion_core.lab.machine import describe_machine
from fluxion_core.models.config import ModelConfig
from fluxion_core.planning.policy import ExactPolicy
from fluxion_core.planning.profiled_queries import KeptQueries
from fluxion_core.planning.prompt_estimate import PromptEstimator, padded_tokens
from fluxion_core.pool.cpu_pool import CpuPool
from fluxion_core.prompt.compute import compute_prompt

VOCABULARY = 2048
"""In place of the model's: logits would be half of a step that has few layers."""

_WARM_UPS = 3


@dataclass(frozen=True)
class ProfileFigures:
    """One profile between a stream's steps."""

    shape: str
    num_layers: int
    tokens: int
    threads: int
    step_layer_ms: float
    """Of a step while there is no profile, median, over its layers."""
    slices: int
    slice_ms: float
    """Median."""
    longest_slice_ms: float
    gap_before_ms: float
    """From one token of the stream to the next without a profile, median."""
    gap_beside_ms: float
    """The same while there is one."""
    cpu_seconds: float
    """Of all slices."""
    layer_cpu_seconds: float
    """Of a layer."""
    estimator_layer_cpu_seconds: float
    """Of a layer, by the estimator."""
    prefill_layer_cpu_seconds: float | None = None
    """Of a layer of the prompt's prefill without a profile, one thread of torch; None: not run."""


def run_profile(
    config: ModelConfig,
    shape: str,
    *,
    tokens: int,
    steps: int,
    threads: int | None = None,
) -> ProfileFigures:
    """Measure one shape at one length.

    Args:
        config: the shape.
        shape: its name.
        tokens: of the prompt and of the stream; a multiple of 16.
        steps: of the stream, before there is a profile.
        threads: of the pool; None for its default.
    """
    pool = CpuPool(threads)
    window = WindowSpec()
    geometry = KvGeometry(config.num_layers, config.num_kv_heads, config.head_dim)
    new_tokens = 4096
    slabs = 2 * geometry.slabs_for(tokens + new_tokens)
    store = HostKvStore(geometry, (slabs + 1) * (geometry.slab_bytes + 4096), model_key=b"")
    prompt, stream = fill_sequences(store, [tokens, tokens], new_tokens, threads=2)
    step = step_for(random_decoder(config, torch.device("cpu")), store, window, pool, max_rows=1)
    row = StepRow(stream, step.join(stream), 1, ExactPolicy())

    def run_step() -> float:
        started = time.perf_counter()
        step.run([row])
        return time.perf_counter() - started

    before = [run_step() for _ in range(_WARM_UPS + steps)][_WARM_UPS:]
    queries, query = _random_queries(config, tokens)
    profiling = PromptProfiling(prompt, window, queries, pool)
    slices: list[float] = []
    gaps: list[float] = []
    cpu = 0.0
    while not profiling.is_done:
        started, cpu_then = time.perf_counter(), time.process_time()
        step.advance_profile(profiling)
        slices.append(time.perf_counter() - started)
        cpu += time.process_time() - cpu_then
        gaps.append(slices[-1] + run_step())
    return ProfileFigures(
        shape=shape,
        num_layers=config.num_layers,
        tokens=tokens,
        threads=pool.num_threads,
        step_layer_ms=median(before) / config.num_layers * 1e3,
        slices=len(slices),
        slice_ms=median(slices) * 1e3,
        longest_slice_ms=max(slices) * 1e3,
        gap_before_ms=median(before) * 1e3,
        gap_beside_ms=median(gaps) * 1e3,
        cpu_seconds=cpu,
        layer_cpu_seconds=cpu / config.num_layers,
        estimator_layer_cpu_seconds=_estimator_seconds(prompt, query, window),
    )


def _random_queries(config: ModelConfig, tokens: int) -> tuple[KeptQueries, torch.Tensor]:
    """Profiled queries, the same for each layer, and those of one: [rows, heads, head_dim]."""
    kept = KeptQueries(tokens, config.num_layers)
    shape = (len(kept.positions), config.num_heads, config.head_dim)
    query = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for layer in range(config.num_layers):
        kept.add(layer, query)
    return kept, query


def _estimator_seconds(prompt: SequenceKv, query: torch.Tensor, window: WindowSpec) -> float:
    """CPU seconds of one layer's profile, not the first, with a copy of the KV in float32."""
    tokens = prompt.num_prompt_tokens
    room = padded_tokens(tokens) - tokens
    heads = range(prompt.store.geometry.num_kv_heads)
    with _one_thread():
        stored = torch.stack([torch.stack(gather_kv(prompt, 0, head)) for head in heads], 1)
        held = torch.nn.functional.pad(stored, (0, 0, 0, room))
        estimator = PromptEstimator(tokens, window)
        estimator.estimate(query, *held.float())
        started = time.process_time()
        estimator.estimate(query, *held.float())
        return time.process_time() - started


def prefill_seconds(config: ModelConfig, tokens: int) -> float:
    """CPU seconds of one layer's prefill."""
    decoder = random_decoder(config, torch.device("cpu"))
    geometry = KvGeometry(config.num_layers, config.num_kv_heads, config.head_dim)
    with _one_thread():
        started = time.process_time()
        compute_prompt(decoder, geometry, [1] * tokens)
        return (time.process_time() - started) / config.num_layers


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True, kw_only=True)
class PromptProfileBench(JsonOption, Command):
    """Time a follow-up's profile beside a stream."""

    shape: str = "llama-3.1-8b"
    """Model shape with random weights."""
    layers: Annotated[int, within(1)] = 2
    """As many of the shape's."""
    tokens: Numbers = (8192, 32_768)
    """Of the prompt and of the stream; multiples of 16."""
    steps: Annotated[int, within(1)] = 20
    """Of the stream, before there is a profile."""
    threads: Annotated[int | None, within(1)] = None
    """Of the pool; as many as a node has if not given."""
    prefill: bool = False
    """Compute the prompt too, which takes long."""

    def __call__(self) -> None:
        """Print a line for each length; keep the figures."""
        console = self.console(width=400)
        machine = describe_machine()
        console.print("  ".join(f"{name} {value}" for name, value in machine.items()))
        config = replace(shape_named(self.shape, self.layers), vocab_size=VOCABULARY)
        figures = []
        for tokens in self.tokens:
            one = run_profile(
                config,
                self.shape,
                tokens=tokens,
                steps=self.steps,
                threads=self.threads,
            )
            if self.prefill:
                one = replace(one, prefill_layer_cpu_seconds=prefill_seconds(config, tokens))
            figures.append(asdict(one))
            console.print(_line(one), highlight=False)
        self.write({"machine": machine, "figures": figures})


def _line(one: ProfileFigures) -> str:
    seconds = one.prefill_layer_cpu_seconds
    prefill = "" if seconds is None else f", prefill {seconds:.3f}"
    return (
        f"{one.shape}, {one.num_layers} layers, {one.tokens} tokens, {one.threads} threads: "
        f"a layer of a step {one.step_layer_ms:.2f} ms; {one.slices} slices of "
        f"{one.slice_ms:.2f} ms (longest {one.longest_slice_ms:.2f}); a stream's tokens "
        f"{one.gap_beside_ms:.1f} ms apart, {one.gap_before_ms:.1f} without a profile; "
        f"{one.layer_cpu_seconds:.3f} CPU s a layer, by the estimator "
        f"{one.estimator_layer_cpu_seconds:.3f}{prefill}"
    )


if __name__ == "__main__":
    sys.exit(run_module(PromptProfileBench))
