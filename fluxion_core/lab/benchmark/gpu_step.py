"""Time of a decode step on a GPU machine: shapes of real models, policies and lanes side by side.

    python -m fluxion_core.lab.benchmark.gpu_step --shape llama-3.1-8b --contexts 131072
    --batches 1,4 --mixed 131072+65536+32768 --policies "fixed(16, 5 %),profile.safetensors"
    --lanes cpu,gpu,both --steps 20 --json out.json

Weights are random, KV is synthetic and fills its own memory. A policy is one of the engine's, or a
file of recorded plans. Beside each figure is its limit: the dense step alone in a CUDA graph
(dense_step.py) plus the bytes that were read, at the sum of the rates at which CPUs and GPU read
host memory, all measured in the same run. With recorded plans, plans are made and waited for all
the same, by a network of the shipped one's size, and the recorded ones followed. A step samples its
rows as a served one does (`STEP_SAMPLING`), within its time; the dense step alone does not.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from fluxion_core.config.command_options import JsonOption, Numbers, Texts
from fluxion_core.config.commands import Command, run_module, within
from fluxion_core.decode.device.step import DeviceStep, Lanes
from fluxion_core.decode.step import StepRow
from fluxion_core.errors import ConfigError
from fluxion_core.generation.sampling import sample_rows
from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.lab.benchmark.dense_step import DenseStep
from fluxion_core.lab.benchmark.model_shapes import fill_sequences, random_decoder, shape_named
from fluxion_core.lab.benchmark.random_planner import blank_state, random_planner
from fluxion_core.lab.benchmark.read_rates import launch_read, measure_host_read, measure_uva
from fluxion_core.lab.benchmark.recorded_plans import RecordedPlans
from fluxion_core.lab.benchmark.replayed_policy import ReplayedPolicy
from fluxion_core.lab.benchmark.report import describe_machine
from fluxion_core.lab.benchmark.sampling import STEP_SAMPLING, step_samplers
from fluxion_core.lab.provenance import Provenance
from fluxion_core.machine.cpus import usable_cpus
from fluxion_core.models.config import ModelConfig
from fluxion_core.observe.nvml import MIN_LOOK_SECONDS, open_nvml
from fluxion_core.planning.constants import READ_NOTHING
from fluxion_core.planning.policy import MarginalPolicy, Policy, parse_policy
from fluxion_core.pool.thread_choice import make_pool

WARM_UP_STEPS = 4
STREAMING = "all heads streaming"
PLANNING = "planning alone"
_TOO_DEAR = MarginalPolicy(1e9)
"""A price at which nothing is read: the step's time is that of planning."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class GpuStepOptions:
    """Measurements to make."""

    shape: str = "llama-3.1-8b"
    """Model shape with random weights."""
    layers: Annotated[int | None, within(1)] = None
    """Fewer than the shape has, for a quick look; figures are then of so many layers."""
    contexts: Numbers = (131_072,)
    """Lengths of sequences, tokens."""
    batches: Numbers = (1, 4)
    """Of sequences of one length, for each of the contexts."""
    mixed: Annotated[Texts, Parameter(metavar="N+N,N+N")] = ()
    """More batches, each given by its sequences' lengths."""
    policies: Texts = ("fixed(16, 5 %)",)
    """Names, or files of recorded plans."""
    lanes: Texts = ("cpu", "gpu", "both")
    """Who attends to host KV."""
    steps: Annotated[int, within(1)] = 20
    """That count."""
    digest_bits: int = 16
    """16 or 8."""
    device_digests: bool = True
    """The lane scans copies of digests on the device."""
    threads: Annotated[int | None, within(1)] = None
    """Of the CPU pool; as many as a node chooses if not given."""

    @property
    def cases(self) -> list[tuple[int, ...]]:
        """Lengths of the sequences of every batch.

        Raises:
            ConfigError: a mixed batch is not lengths with + between them.
        """
        same = [(context,) * batch for context in self.contexts for batch in self.batches]
        return same + [tuple(sorted(lengths_of(text), reverse=True)) for text in self.mixed]


def lengths_of(text: str) -> list[int]:
    """Lengths with + between them.

    Raises:
        ConfigError: they are none.
    """
    try:
        return [int(length) for length in text.split("+")]
    except ValueError:
        raise ConfigError(f"mixed {text!r}: lengths with + between them, as 65536+32768") from None


@dataclass(frozen=True)
class GpuStepFigure:
    """One way to do a step. Medians."""

    lengths: tuple[int, ...]
    """Of the sequences."""
    policy: str
    lanes: str
    milliseconds: float
    gpu_milliseconds: float
    """From the graph's first kernel to its last."""
    idle_milliseconds: float
    """Of that, the GPU did nothing."""
    read_bytes: float
    """Digests and KV of regions, in host memory, by both devices."""
    lane_bytes: float
    """Of that, by the GPU."""
    device_digest_bytes: float
    """Scanned by the GPU in its own memory, beside that."""
    lane_task_share: float
    """Tasks that the GPU did, of those that read something."""
    dense_milliseconds: float
    """The dense step alone."""
    limit_milliseconds: float
    counted_pcie_bytes: float
    """To the GPU, per step, as counted here: what the lane read, and attention states."""
    nvml_pcie_bytes: float
    """To the GPU, per step, as the card counted; 0 where it does not."""
    sampling_milliseconds: float
    """Of the step, on the CPU pool, once the logits are there."""

    @property
    def over_limit(self) -> float:
        """Step over its limit."""
        return self.milliseconds / self.limit_milliseconds

    @property
    def batch_name(self) -> str:
        """Such as 4 x 131,072, or 131,072 + 32,768."""
        if len(set(self.lengths)) == 1:
            return f"{len(self.lengths)} x {self.lengths[0]:,}"
        return " + ".join(f"{length:,}" for length in self.lengths)


@dataclass(frozen=True)
class StepMethod:
    """A policy by name, recorded plans, or a step without attention to the region."""

    name: str
    plans: RecordedPlans | None = None

    def policy(self, config: ModelConfig, region: range, step: int, row: int) -> Policy:
        """Policy of one row in one step."""
        if self.name == STREAMING:
            levels = torch.full((config.num_layers, config.num_kv_heads), READ_NOTHING)
            budgets = torch.zeros(config.num_layers, config.num_heads)
            return ReplayedPolicy(levels.int(), budgets.int())
        if self.plans is not None:
            return self.plans.policy_for(config, region, step, row, behind=_TOO_DEAR)
        return _TOO_DEAR if self.name == PLANNING else parse_policy(self.name)


class GpuStepBench:
    """A shape, its KV in a pinned store, and steps of it.

    Args:
        options: what to measure.
        console: takes notes of progress.
    """

    def __init__(self, options: GpuStepOptions, console: Console) -> None:
        self.options, self._console = options, console
        self.config = shape_named(options.shape, options.layers)
        self.device = torch.device("cuda")
        self.window = WindowSpec()
        config = self.config
        self.geometry = KvGeometry(
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            digest_bits=options.digest_bits,
        )
        self.decoder = random_decoder(config, self.device)
        new_tokens = 16
        # Shorter sequences are beginnings of the long ones.
        lengths = [max(row) for row in zip_longest(*options.cases, fillvalue=0)]
        slabs = sum(self.geometry.slabs_for(length + new_tokens) for length in lengths)
        size = slabs * (self.geometry.slab_bytes + 4096)
        started = time.perf_counter()
        self.store = HostKvStore(self.geometry, size, model_key=b"bench")
        self.sequences = fill_sequences(self.store, lengths, new_tokens, threads=len(usable_cpus()))
        self.planner = random_planner(config, options.digest_bits)
        self.states = [blank_state(self.planner) for _ in self.sequences]
        seconds = time.perf_counter() - started
        self._note(f"{size / 2**30:.1f} GiB of KV written in {seconds:.1f} s")
        self.cpu_rate = measure_host_read(self.store)
        self.nvml = open_nvml(f"GPU-{torch.cuda.get_device_properties(self.device).uuid}")
        self.card_bytes = 0.0
        self.uva_rate = 0.0
        self.rates_together = (0.0, 0.0)
        self.state_bytes = config.num_heads * (config.head_dim + 1) * 4
        self.dense_milliseconds = {
            len(lengths): DenseStep(
                self.decoder, self.geometry, self.window, len(lengths), max(lengths)
            ).milliseconds(max(20, options.steps))
            for lengths in sorted(options.cases, key=len)
        }
        for batch, milliseconds in self.dense_milliseconds.items():
            self._note(f"dense step alone, batch {batch}: {milliseconds:.2f} ms")

    def run(self) -> list[GpuStepFigure]:
        """All figures."""
        figures = []
        for lanes in self.options.lanes:
            started = time.perf_counter()
            step = DeviceStep(
                self.decoder,
                self.store,
                self.window,
                make_pool(self.options.threads)[0],
                max_rows=len(self.sequences),
                max_context_tokens=max(max(lengths) for lengths in self.options.cases) + 16,
                lanes=_lanes(lanes),
                planner=self.planner,
                device_digests=self.options.device_digests,
            )
            self._note(f"lanes {lanes}: ready in {time.perf_counter() - started:.1f} s")
            try:
                self._pin_tables()
                if not self.uva_rate:
                    self.uva_rate = measure_uva(self.store)
                    self.rates_together = self._measure_together()
                    cpu, gpu = self.rates_together
                    self._note(
                        f"host read {self.cpu_rate / 1e9:.1f} GB/s, "
                        f"UVA {self.uva_rate / 1e9:.1f} GB/s; "
                        f"at the same time {cpu / 1e9:.1f} and {gpu / 1e9:.1f}"
                    )
                figures += self._lane_figures(step, lanes)
            finally:
                step.close()
                del step
                gc.collect()
        return figures

    def _pin_tables(self) -> None:
        for sequence in self.sequences:
            if not sequence.slab_table.is_pinned():
                sequence.slab_table = sequence.slab_table.pin_memory()

    def _lane_figures(self, step: DeviceStep, lanes: str) -> list[GpuStepFigure]:
        figures = []
        slots = [step.join(sequence) for sequence in self.sequences]
        for lengths in self.options.cases:
            extra = (STREAMING, PLANNING) if lanes == "both" else ()
            for name in (*extra, *self.options.policies):
                way = _method(name)
                turns = self._time(step, slots, lengths, way)
                figures.append(self._figure(turns, lengths, way.name, lanes))
                self._print(figures[-1])
        return figures

    def _time(
        self, step: DeviceStep, slots: Sequence[int], lengths: tuple[int, ...], way: StepMethod
    ) -> list[tuple[float, float, float, int, int, int, int, int, float]]:
        chosen = self.sequences[: len(lengths)]
        regions = [self.window.retrieval_region(length + 1) for length in lengths]
        turns = []
        samplers = step_samplers(len(chosen))
        received = 0
        for number in range(WARM_UP_STEPS + self.options.steps):
            if number == WARM_UP_STEPS:
                received = self._received()
            rows = []
            for index, sequence in enumerate(chosen):
                # The same step again and again: what the last one appended is overwritten.
                sequence.num_tokens = lengths[index]
                policy = way.policy(self.config, regions[index], number, index)
                token = (number * 7919 + index) % self.config.vocab_size
                rows.append(StepRow(sequence, slots[index], token, policy, self.states[index]))
            start = time.perf_counter()
            logits, reads = step.run(rows)
            sampling = time.perf_counter()
            sample_rows(logits, samplers, step.pool)
            now = time.perf_counter()
            seconds, sampling_seconds = now - start, now - sampling
            times = step.times()
            on_device = sum(read.device_scanned_bytes for read in reads)
            of_lane = times.lane_digest_bytes if step.digests_on_device else 0
            groups = sum(sum(read.groups_of_size) + read.groups_everything for read in reads)
            turns.append(
                (
                    seconds,
                    times.total,
                    times.waited_idle,
                    sum(read.total_bytes for read in reads) - on_device - of_lane,
                    times.lane_digest_bytes + times.lane_kv_bytes - of_lane,
                    on_device + of_lane,
                    times.lane_tasks,
                    groups,
                    sampling_seconds,
                )
            )
        self.card_bytes = (self._received() - received) / self.options.steps
        return turns[WARM_UP_STEPS:]

    def _received(self) -> int:
        if self.nvml is None:
            return 0
        # A look sooner than that after the last one sees nothing.
        time.sleep(MIN_LOOK_SECONDS)
        return self.nvml.read().pcie_bytes.get("host_to_device", 0)

    def _figure(
        self,
        turns: Sequence[tuple[float, float, float, int, int, int, int, int, float]],
        lengths: tuple[int, ...],
        policy: str,
        lanes: str,
    ) -> GpuStepFigure:
        seconds, gpu, idle, read, lane, on_device, tasks, groups, sampling = (
            median(column) for column in zip(*turns, strict=True)
        )
        dense = self.dense_milliseconds[len(lengths)]
        limit = dense + read / (self.cpu_rate + self.uva_rate) * 1e3
        return GpuStepFigure(
            lengths,
            policy,
            lanes,
            seconds * 1e3,
            gpu * 1e3,
            idle * 1e3,
            read,
            lane,
            on_device,
            tasks / max(1, groups),
            dense,
            limit,
            lane + len(lengths) * self.config.num_layers * self.state_bytes,
            self.card_bytes,
            sampling * 1e3,
        )

    def _measure_together(self) -> tuple[float, float]:
        """Rates of the CPUs and of the GPU, each while the other reads too."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        # Longer than the CPUs take: their rate is one beside a reading GPU throughout.
        count = sum(launch_read(self.store, 8 << 30) for _ in range(6))
        end.record()
        cpu = measure_host_read(self.store, repeats=9)
        still_reading = not end.query()
        end.synchronize()
        gpu = count / begin.elapsed_time(end) * 1e3
        return (cpu if still_reading else 0.0), gpu

    def _note(self, text: str) -> None:
        self._console.print(text, highlight=False)

    def _print(self, figure: GpuStepFigure) -> None:
        self._note(
            f"{figure.batch_name:14s}  {figure.policy:24s} {figure.lanes:5s} "
            f"{figure.milliseconds:8.2f} ms  idle {figure.idle_milliseconds:7.2f}  "
            f"sampling {figure.sampling_milliseconds:5.2f}  "
            f"read {figure.read_bytes / 1e9:6.2f} GB  by GPU {figure.lane_bytes / 1e9:6.2f}  "
            f"tasks {figure.lane_task_share:5.2f}  limit {figure.limit_milliseconds:7.2f}  "
            f"x{figure.over_limit:4.2f}  PCIe {figure.counted_pcie_bytes / 1e9:6.3f} GB, "
            f"card {figure.nvml_pcie_bytes / 1e9:6.3f}"
        )


def _method(name: str) -> StepMethod:
    if name.endswith(".safetensors"):
        plans = RecordedPlans.load(Path(name))
        return StepMethod(f"{plans.policy}, recorded", plans)
    return StepMethod(name)


def _lanes(name: str) -> Lanes:
    if name not in ("cpu", "gpu", "both"):
        raise ConfigError(f"lanes {name!r}; one of cpu, gpu, both")
    return name  # type: ignore[return-value]


def run_gpu_step_bench(console: Console, options: GpuStepOptions) -> dict[str, object]:
    """Measure; print as it goes, return everything as plain data."""
    bench = GpuStepBench(options, console)
    figures = bench.run()
    report: dict[str, object] = {
        "about": Provenance.of_shape(options.shape, gpu=torch.cuda.get_device_name()).as_json(),
        "machine": describe_machine() | {"gpu": torch.cuda.get_device_name()},
        "options": asdict(options),
        "sampling": STEP_SAMPLING,
        "host_read_gigabytes_per_second": bench.cpu_rate / 1e9,
        "uva_gigabytes_per_second": bench.uva_rate / 1e9,
        "host_read_beside_uva_gigabytes_per_second": bench.rates_together[0] / 1e9,
        "uva_beside_host_read_gigabytes_per_second": bench.rates_together[1] / 1e9,
        "dense_milliseconds": bench.dense_milliseconds,
        "figures": [
            asdict(figure) | {"batch": figure.batch_name, "over_limit": figure.over_limit}
            for figure in figures
        ],
    }
    console.print(f"steps sample their rows: {STEP_SAMPLING}", highlight=False)
    table = Table(box=None, pad_edge=False)
    for column in ("batch", "policy", "lanes", "ms", "of it sampling", "idle ms", "x limit"):
        table.add_column(column)
    for figure in figures:
        table.add_row(
            figure.batch_name,
            figure.policy,
            figure.lanes,
            f"{figure.milliseconds:.2f}",
            f"{figure.sampling_milliseconds:.2f}",
            f"{figure.idle_milliseconds:.2f}",
            f"{figure.over_limit:.2f}",
        )
    console.print(table)
    return report


@dataclass(frozen=True, kw_only=True)
class GpuStepCommand(JsonOption, Command):
    """Time a decode step on a GPU machine: policies and lanes side by side."""

    options: GpuStepOptions = field(default_factory=GpuStepOptions)
    """What is measured."""

    def __call__(self) -> None:
        """Print a table; keep the figures."""
        self.write(run_gpu_step_bench(self.console(width=160), self.options))


if __name__ == "__main__":
    sys.exit(run_module(GpuStepCommand))
