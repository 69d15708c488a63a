"""Decode steps on CPUs that others use too: numbers of threads, and busy processes beside them.

    python -m fluxion_core.lab.benchmark.shared_cpus --contexts 32768,65536 --batch 4
    --threads 8,12,14,15 --busy 1,2,4 --policies "fixed(16, 5 %),plans.safetensors" --steps 24
    --json out.json

Without a GPU steps are the CPU's (`--layers 4` makes a shape small enough for that). Medians of
steps. Beside busy processes, each pinned to a CPU of the pool's, there are three pools: the one
that a node makes; the same without its look for threads that have lost their CPU; and one that
never had the busy CPUs. Variants take turns, `passes` times.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from fluxion_core.config.command_options import JsonOption, Numbers, Texts
from fluxion_core.config.commands import Command, run_module, within
from fluxion_core.decode.device.step import DeviceStep
from fluxion_core.decode.host.attention import HostAttention
from fluxion_core.decode.host.decoder import HostDecoder
from fluxion_core.decode.host.step import HostStep
from fluxion_core.decode.step import StepRow
from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.lab.benchmark.model_shapes import fill_sequences, random_decoder, shape_named
from fluxion_core.lab.benchmark.random_planner import blank_state, random_planner
from fluxion_core.lab.benchmark.recorded_plans import RecordedPlans
from fluxion_core.lab.benchmark.report import describe_machine
from fluxion_core.lab.provenance import Provenance
from fluxion_core.machine.cpus import usable_cpus
from fluxion_core.models.decoder import Decoder
from fluxion_core.planning.policy import MarginalPolicy, Policy, parse_policy
from fluxion_core.pool.cpu_pool import CpuPool
from fluxion_core.pool.thread_choice import make_pool

WARM_UP_STEPS = 8
_FOLLOWS_A_RECORD = MarginalPolicy(1e9)
_NEW_TOKENS = 16


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SharedCpusOptions:
    """Measurements to make."""

    shape: str = "llama-3.1-8b"
    """Model shape with random weights."""
    layers: Annotated[int | None, within(1)] = None
    """Fewer than the shape has."""
    contexts: Numbers = (32_768,)
    """Lengths of sequences, tokens."""
    batch: Annotated[int, within(1)] = 4
    """Sequences of a step."""
    policies: Texts = ("fixed(16, 5 %)",)
    """Names, or, with a GPU, files of recorded plans."""
    threads: Numbers = ()
    """Numbers of threads, beside the default's."""
    busy: Numbers = (1,)
    """Numbers of CPUs that a busy process is pinned to; an empty text for none."""
    steps: Annotated[int, within(1)] = 24
    """Of a pass, that count."""
    passes: Annotated[int, within(1)] = 2
    """How often the variants take turns."""


@dataclass(frozen=True)
class Variant:
    """A pool, and what runs beside it."""

    name: str
    threads: int | None
    """None: chosen as a node does."""
    busy: tuple[int, ...] = ()
    """CPUs with a busy process each."""
    watches: bool = True
    keeps_off: bool = False
    """The pool never had the busy CPUs."""


@dataclass
class Figure:
    """A variant's steps of one batch and policy."""

    variant: str
    context: int
    policy: str
    threads: int
    milliseconds: list[float] = field(default_factory=list)
    """Median of each pass."""
    stalls: int = 0
    """Times that a thread was found without its CPU, all passes."""

    @property
    def median_milliseconds(self) -> float:
        """Median over the passes."""
        return median(self.milliseconds)


class SharedCpusBench:
    """A shape and its KV; steps of it on one pool after the other."""

    def __init__(self, options: SharedCpusOptions, console: Console) -> None:
        self.options, self._console = options, console
        self.config = shape_named(options.shape, options.layers)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.window = WindowSpec()
        config = self.config
        geometry = KvGeometry(config.num_layers, config.num_kv_heads, config.head_dim)
        self.decoder = self._new_decoder()
        longest = max(options.contexts)
        slabs = options.batch * geometry.slabs_for(longest + _NEW_TOKENS)
        self.store = HostKvStore(geometry, slabs * (geometry.slab_bytes + 4096), model_key=b"bench")
        self.sequences = fill_sequences(
            self.store, [longest] * options.batch, _NEW_TOKENS, threads=len(usable_cpus())
        )
        self.planner = random_planner(config, 16)
        self.states = [blank_state(self.planner) for _ in self.sequences]
        self.figures: dict[tuple[str, int, str], Figure] = {}

    def _new_decoder(self) -> Decoder:
        return random_decoder(self.config, self.device)

    def run(self) -> list[Figure]:
        """All figures."""
        cpus = usable_cpus()
        variants = [Variant("default", None)]
        variants += [Variant(f"{count} threads", count) for count in self.options.threads]
        for count in self.options.busy:
            # Where workers are: the first CPUs, that of most interrupts last.
            busy = tuple((cpus[1:] + cpus[:1])[:count])
            name = f"{count} busy"
            variants += [
                Variant(f"{name}: default", None, busy),
                Variant(f"{name}: not watched", None, busy, watches=False),
            ]
            if count < len(cpus):
                variants.append(Variant(f"{name}: CPUs not used", None, busy, keeps_off=True))
        for _ in range(self.options.passes):
            for variant in variants:
                with _busy_processes(variant.busy), _affinity(variant):
                    self._measure(variant)
        return list(self.figures.values())

    def _measure(self, variant: Variant) -> None:
        pool, choice = make_pool(variant.threads)
        if not variant.watches:
            pool = CpuPool(choice.num_threads, watches=False)
        step = self._make_step(pool)
        try:
            slots = [step.join(sequence) for sequence in self.sequences]
            for context in self.options.contexts:
                for name in self.options.policies:
                    before = pool.stalls
                    milliseconds, policy = self._time(step, slots, context, name)
                    key = (variant.name, context, policy)
                    figure = self.figures.setdefault(key, Figure(*key, pool.num_threads))
                    figure.milliseconds.append(milliseconds)
                    figure.stalls += pool.stalls - before
                    self._console.print(
                        f"{variant.name:24s} {pool.num_threads:3d} threads  {context:7,d}  "
                        f"{policy:28s} {milliseconds:8.2f} ms  {pool.stalls - before} stalls, "
                        f"{pool.num_left_out} CPUs left out; choice by {choice.measured}",
                        highlight=False,
                    )
        finally:
            step.close()
            del step
            gc.collect()

    def _make_step(self, pool: CpuPool) -> HostStep | DeviceStep:
        config = self.config
        if self.device.type == "cpu":
            attention = HostAttention(
                self.store,
                self.window,
                num_heads=config.num_heads,
                pool=pool,
                planner=self.planner,
            )
            # Packing takes its weights: each pool has its own.
            decoder, self.decoder = self.decoder, self._new_decoder()
            return HostStep(HostDecoder(decoder, pool), attention)
        step = DeviceStep(
            self.decoder,
            self.store,
            self.window,
            pool,
            max_rows=len(self.sequences),
            max_context_tokens=max(self.options.contexts) + _NEW_TOKENS,
            lanes="both",
            planner=self.planner,
        )
        for sequence in self.sequences:
            if not sequence.slab_table.is_pinned():
                sequence.slab_table = sequence.slab_table.pin_memory()
        return step

    def _time(
        self,
        step: HostStep | DeviceStep,
        slots: Sequence[int],
        context: int,
        name: str,
    ) -> tuple[float, str]:
        plans = RecordedPlans.load(Path(name)) if name.endswith(".safetensors") else None
        region = self.window.retrieval_region(context + 1)
        turns = []
        for number in range(WARM_UP_STEPS + self.options.steps):
            rows = []
            for index, sequence in enumerate(self.sequences):
                # The same step again and again: what the last one appended is overwritten.
                sequence.num_tokens = context
                policy: Policy = (
                    parse_policy(name)
                    if plans is None
                    else plans.policy_for(self.config, region, number, index, _FOLLOWS_A_RECORD)
                )
                token = (number * 7919 + index) % self.config.vocab_size
                state = self.states[index]
                rows.append(StepRow(sequence, slots[index], token, policy, state))
            start = time.perf_counter()
            step.run(rows)
            turns.append(time.perf_counter() - start)
        return median(turns[WARM_UP_STEPS:]) * 1e3, plans.policy if plans else name


@contextmanager
def _busy_processes(cpus: Sequence[int]) -> Iterator[None]:
    """A process on each of these CPUs that never rests."""
    program = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
    running = [subprocess.Popen([sys.executable, "-c", program, str(cpu)]) for cpu in cpus]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


@contextmanager
def _affinity(variant: Variant) -> Iterator[None]:
    """This thread, and those it starts, off the busy CPUs, if the variant says so."""
    before = os.sched_getaffinity(0)
    if variant.keeps_off:
        os.sched_setaffinity(0, before - set(variant.busy))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def run_shared_cpus_bench(console: Console, options: SharedCpusOptions) -> dict[str, object]:
    """Measure; print as it goes, return everything as plain data."""
    machine = describe_machine()
    console.print(str(machine), highlight=False)
    figures = SharedCpusBench(options, console).run()
    table = Table(box=None, pad_edge=False)
    for column in ("variant", "threads", "context", "policy", "ms", "of default", "stalls"):
        table.add_column(column)
    alone = {
        (figure.context, figure.policy): figure.median_milliseconds
        for figure in figures
        if figure.variant == "default"
    }
    for figure in figures:
        table.add_row(
            figure.variant,
            str(figure.threads),
            f"{figure.context:,}",
            figure.policy,
            f"{figure.median_milliseconds:.2f}",
            f"{figure.median_milliseconds / alone[figure.context, figure.policy]:.2f}",
            str(figure.stalls),
        )
    console.print(table)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "about": Provenance.of_shape(options.shape, gpu=gpu).as_json(),
        "machine": machine,
        "options": asdict(options),
        "figures": [
            asdict(figure) | {"median_milliseconds": figure.median_milliseconds}
            for figure in figures
        ],
    }


@dataclass(frozen=True, kw_only=True)
class SharedCpusCommand(JsonOption, Command):
    """Time decode steps on CPUs that others use too."""

    options: SharedCpusOptions = field(default_factory=SharedCpusOptions)
    """What is measured."""

    def __call__(self) -> None:
        """Print a table; keep the figures."""
        self.write(run_shared_cpus_bench(self.console(width=180), self.options))


if __name__ == "__main__":
    sys.exit(run_module(SharedCpusCommand))
