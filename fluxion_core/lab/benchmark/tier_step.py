"""Time of a decode step over the share of KV in device memory, by recorded selections.

    python -m fluxion_core.lab.benchmark.tier_step --shape llama-3.1-8b --contexts 131072
    --batches 4 --recordings "fixed.npz,threshold.npz" --kv "100 %,20 %,5 %,0 %" --json out.json

Weights are random, KV is synthetic and fills its own memory; what heads read is recorded from a
real model (record_selections.py) and stretched to the shape, so that the tier is hit as it would
be. The step selects, splits, asks and fills by its own kernels; marks in place of scores, by which
it chooses what was recorded, are within its time, and so is sampling. Warm-up steps run first, in
the recording's order and each some times, so that the tier can follow them; those that are timed
come after them.

Policies by name are chosen by real scores: `exact`, where all KV is resident, and what a step costs
without any region. At 0 % there is no tier: the engine of before, with plans of the same sizes.

Beside each figure: the memory that KV has on the device; exact attention with all KV there, the
ways that torch has (exact_step.py); and a limit, the dense step, resident bytes at the rate of
copies, and missed ones at the sum of the rates at which CPUs and GPU read host memory. With
`--kernels` each figure is followed by what the kernels of its steps took (step_kernels.py).
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
from cyclopts import Parameter
from rich.console import Console

from fluxion_core.config.command_options import JsonOption, Numbers, Texts
from fluxion_core.config.commands import Command, run_module, within
from fluxion_core.decode.device.step import DeviceStep
from fluxion_core.decode.device.tier import DeviceTier, TierState
from fluxion_core.decode.step import StepRow
from fluxion_core.errors import ShapeError
from fluxion_core.generation.sampling import TokenSampler, sample_rows
from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.lab.benchmark.dense_step import DenseStep
from fluxion_core.lab.benchmark.exact_step import (
    RIVALS,
    ExactFigure,
    ExactStep,
    measure_copies,
)
from fluxion_core.lab.benchmark.gpu_step import PLANNING, STREAMING, StepMethod, lengths_of
from fluxion_core.lab.benchmark.model_shapes import fill_sequences, random_decoder, shape_named
from fluxion_core.lab.benchmark.random_planner import blank_state, random_planner
from fluxion_core.lab.benchmark.read_rates import measure_host_read, measure_uva
from fluxion_core.lab.benchmark.recorded_selections import RecordedSelections
from fluxion_core.lab.benchmark.report import describe_machine
from fluxion_core.lab.benchmark.sampling import STEP_SAMPLING, step_samplers
from fluxion_core.lab.benchmark.selection_replay import MarkedScores, SelectionReplay
from fluxion_core.lab.benchmark.step_kernels import kernel_table, kernel_times, record_kernels
from fluxion_core.lab.benchmark.tier_figures import (
    ExactRate,
    KvShare,
    TierStepFigure,
    batch_name,
    groups_that_fit,
)
from fluxion_core.lab.provenance import Provenance
from fluxion_core.machine.cpus import usable_cpus
from fluxion_core.models.config import ModelConfig
from fluxion_core.observe.nvml import MIN_LOOK_SECONDS, open_nvml
from fluxion_core.planning.planner import PlannerState
from fluxion_core.planning.policy import Policy
from fluxion_core.pool.thread_choice import make_pool

NEW_TOKENS = 16
"""Room of each sequence for tokens of its own."""

SHARES = ("100 %", "40 %", "20 %", "10 %", "5 %", "0 %")

WARM_STEPS = 4
"""Before those that are timed, where nothing has to come into the tier."""

OLD_STEPS = 12
"""Timed without a tier, at most: nothing there depends on the step before."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TierStepOptions:
    """Measurements to make."""

    shape: str = "llama-3.1-8b"
    """Model shape with random weights."""
    layers: Annotated[int | None, within(1)] = None
    """Fewer than the shape has, for a quick look; figures are then of so many layers."""
    contexts: Numbers = (131_072,)
    """Lengths of sequences, tokens."""
    batches: Numbers = (4,)
    """Of sequences of one length, for each of the contexts."""
    mixed: Annotated[Texts, Parameter(metavar="N+N,N+N")] = ()
    """More batches, each given by its sequences' lengths."""
    recordings: Texts = ()
    """Files of recorded selections, of the same texts and steps."""
    policies: Texts = ("exact", STREAMING, PLANNING)
    """By name, where all KV is resident."""
    kv: Annotated[Texts, Parameter(metavar="N %,N GiB")] = SHARES
    """KV in device memory, as shares of the batch's or sizes; 0 %: no tier."""
    warm_up: Annotated[int, within(1)] = 96
    """Recorded steps before those that are timed, where KV is missing."""
    warm_up_repeats: Annotated[int, within(1)] = 2
    """Times that each of them is run: a tier of many GiB takes more steps to warm up than are
    recorded."""
    steps: Annotated[int, within(1)] = 32
    """Timed."""
    digest_bits: int = 16
    """16 or 8."""
    digest_slabs: Annotated[int | None, within(1)] = None
    """Slabs whose digests have copies in device memory, at most; the others' are read over PCIe."""
    rivals: Texts = RIVALS
    """Ways of exact attention with all KV in device memory, as in exact_step.py; none: ''."""
    kernels: Annotated[int, within(0)] = 0
    """Steps of each figure that are run again, under a profiler."""
    threads: Annotated[int | None, within(1)] = None
    """Of the CPU pool; as many as a node chooses if not given."""
    commit: str = ""
    """Of the code, where it does not lie in a repository."""

    @property
    def cases(self) -> list[tuple[int, ...]]:
        """Lengths of the sequences of every batch, the batch with most tokens first.

        Raises:
            ConfigError: a mixed batch is not lengths with + between them.
        """
        same = [(context,) * batch for context in self.contexts for batch in self.batches]
        mixed = [tuple(sorted(lengths_of(text), reverse=True)) for text in self.mixed]
        return sorted(same + mixed, key=sum, reverse=True)

    @property
    def shares(self) -> list[KvShare]:
        """Sizes of KV in device memory.

        Raises:
            ConfigError: one is none.
        """
        return [KvShare.parse(text) for text in self.kv]


@dataclass(frozen=True)
class _Turn:
    """One step that was timed."""

    seconds: float
    sampling_seconds: float
    gpu_seconds: float
    idle_seconds: float
    selected_bytes: int
    missed_bytes: int
    region_bytes: int
    scanned_bytes: int


@dataclass
class _Method:
    """What the rows of a step read: by a policy's name, or as recorded."""

    name: str
    replay: SelectionReplay | None = None
    made: dict[tuple[range, int, int], Policy] = field(default_factory=dict)

    def policy(self, config: ModelConfig, region: range, step: int, row: int) -> Policy:
        """Policy of one row in one step; made once, so that it takes no time between steps."""
        key = (region, step, row)
        if key not in self.made:
            self.made[key] = (
                StepMethod(self.name).policy(config, region, step, row)
                if self.replay is None
                else self.replay.policy(region, step, row)
            )
        return self.made[key]


class TierStepBench:
    """A shape, a pinned store with room for the largest batch, and steps of it.

    Args:
        options: what to measure.
        console: takes notes of progress.

    Raises:
        ConfigError: options, or recordings, that cannot be.
    """

    def __init__(self, options: TierStepOptions, console: Console) -> None:
        self.options, self._console = options, console
        self.config = config = shape_named(options.shape, options.layers)
        self.device = torch.device("cuda")
        self.window = WindowSpec()
        self.geometry = KvGeometry(
            config.num_layers, config.num_kv_heads, config.head_dim, digest_bits=options.digest_bits
        )
        recordings = [RecordedSelections.load(Path(name)) for name in options.recordings]
        self.recorded_abouts = [recorded.about for recorded in recordings]
        self.max_rows = max(len(lengths) for lengths in options.cases)
        self._recorded = [
            _Method(recorded.policy, SelectionReplay(recorded, config)) for recorded in recordings
        ]
        self._named = [_Method(name) for name in options.policies]
        self.decoder = random_decoder(config, self.device)
        self._marks = MarkedScores(recordings, config, self.max_rows, self.device)
        slabs = max(
            sum(self.geometry.slabs_for(length + NEW_TOKENS) for length in lengths)
            for lengths in options.cases
        )
        self._store_bytes = slabs * (self.geometry.slab_bytes + 4096)
        self.planner = random_planner(config, options.digest_bits)
        self.copy_rate = measure_copies(self.device)
        self.host_rate = self.uva_rate = 0.0
        self.nvml = open_nvml(f"GPU-{torch.cuda.get_device_properties(self.device).uuid}")
        self.exact: list[ExactFigure] = []
        self.exact_rates: list[ExactRate] = []
        self._dense: dict[int, float] = {}
        self._first_id = 0
        self._live: tuple[tuple[int, ...], list[SequenceKv]] = ((), [])

    def run(self) -> list[TierStepFigure]:
        """All figures."""
        options = self.options
        self._note(f"copies within device memory: {self.copy_rate / 1e12:.2f} TB/s")
        for lengths in options.cases:
            self._dense_milliseconds(len(lengths), max(lengths))
            if any(options.rivals):
                self._measure_rivals(lengths)
        torch.cuda.empty_cache()
        started = time.perf_counter()
        self.store = HostKvStore(self.geometry, self._store_bytes, model_key=b"bench")
        self._note(f"{self._store_bytes / 2**30:.1f} GiB of arena: {_since(started)}")
        # Memory that has been written is pinned sooner.
        self._sequences_of(options.cases[0])
        self.host_rate = measure_host_read(self.store)
        figures: list[TierStepFigure] = []
        sizes = [
            share.of(self._kv_bytes(case)) for case in options.cases for share in options.shares
        ]
        if max(sizes) > 0:
            with self._device_step(max(sizes)) as step:
                for lengths in options.cases:
                    figures += self._tier_figures(step, lengths)
        if min(sizes) == 0:
            with self._device_step(0) as step:
                # The last ones first: they are there.
                for lengths in reversed(options.cases):
                    figures += self._old_figures(step, lengths)
        return figures

    def _kv_bytes(self, lengths: Sequence[int]) -> int:
        return sum(lengths) * self.geometry.token_bytes

    def _dense_milliseconds(self, rows: int, tokens: int) -> float:
        if rows not in self._dense:
            dense = DenseStep(self.decoder, self.geometry, self.window, rows, tokens)
            self._dense[rows] = dense.milliseconds(20)
            self._note(f"dense step alone, batch {rows}: {self._dense[rows]:.2f} ms")
        return self._dense[rows]

    def _measure_rivals(self, lengths: tuple[int, ...]) -> None:
        """Exact with all KV there; and in turns, where the memory for KV is a size."""
        free, _ = torch.cuda.mem_get_info(self.device)
        if self._kv_bytes(lengths) < 0.9 * free:
            self._exact(lengths)
        for share in self.options.shares:
            if share.percent is not None:
                continue
            groups = groups_that_fit(lengths, share.num_bytes // self.geometry.token_bytes)
            if sum(map(len, groups)) < len(lengths):
                continue
            rate = ExactRate(lengths, str(share), tuple(groups), sum(map(self._exact, groups)))
            self.exact_rates.append(rate)
            self._note(
                f"exact within {share}: {batch_name(lengths)} in {len(groups)} groups, "
                f"{rate.milliseconds:.2f} ms a token of each, {rate.tokens_per_second:.0f} tokens/s"
            )

    def _exact(self, lengths: tuple[int, ...]) -> float:
        """Milliseconds of the fastest way, for rows of the batch's mean length."""
        rows, tokens = len(lengths), sum(lengths) // len(lengths)
        # What was cut to whole pieces is still this batch.
        own = [one for one in self.exact if one.rows == rows and 0 <= tokens - one.tokens < 256]
        if not own:
            dense = self._dense_milliseconds(rows, tokens)
            exact = ExactStep(self.decoder, self.geometry, self.copy_rate)
            own = exact.measure(rows, tokens, dense, self.options.rivals, self._console)
            self.exact += own
            gc.collect()
            torch.cuda.empty_cache()
        return min(one.milliseconds for one in own)

    @contextmanager
    def _device_step(self, device_kv_bytes: int) -> Iterator[DeviceStep]:
        started = time.perf_counter()
        step = DeviceStep(
            self.decoder,
            self.store,
            self.window,
            make_pool(self.options.threads)[0],
            max_rows=self.max_rows,
            max_context_tokens=max(map(max, self.options.cases)) + NEW_TOKENS,
            planner=self.planner,
            device_kv_bytes=device_kv_bytes,
            max_digest_slabs=self.options.digest_slabs if device_kv_bytes else None,
            scores_hook=self._marks if device_kv_bytes and self._recorded else None,
        )
        self._note(f"step with {device_kv_bytes / 2**30:.1f} GiB for KV: {_since(started)}")
        try:
            if not self.uva_rate:
                self.uva_rate = measure_uva(self.store)
                self._note(
                    f"host read {self.host_rate / 1e9:.1f} GB/s, UVA {self.uva_rate / 1e9:.1f}"
                )
            yield step
        finally:
            step.close()
            del step
            gc.collect()
            torch.cuda.empty_cache()

    def _sequences_of(self, lengths: tuple[int, ...]) -> list[SequenceKv]:
        """The store's only sequences, written anew if they are of other lengths."""
        if self._live[0] != lengths:
            for sequence in self._live[1]:
                sequence.release()
            started = time.perf_counter()
            sequences = fill_sequences(
                self.store,
                lengths,
                NEW_TOKENS,
                threads=len(usable_cpus()),
                first_id=self._first_id,
            )
            # What is left of them must not be shared with the next ones.
            self._first_id += len(lengths)
            self._live = (lengths, sequences)
            self._note(f"{batch_name(lengths)} written: {_since(started)}")
        return self._live[1]

    def _tier_figures(self, step: DeviceStep, lengths: tuple[int, ...]) -> list[TierStepFigure]:
        assert step.selection is not None, "there is no room for a tier"
        figures, tier = [], step.selection.tier
        kv_bytes, sequences = self._kv_bytes(lengths), self._sequences_of(lengths)
        for share in self.options.shares:
            size = share.of(kv_bytes)
            if size == 0:
                continue
            started = time.perf_counter()
            try:
                restart(tier, min(size, tier.num_slots * self.geometry.block_bytes))
            except ShapeError as error:
                self._note(f"{batch_name(lengths)}, {share}: {error}")
                continue
            rows = self._joined(step, sequences, lengths)
            fill_up(tier)
            held = tier.statistics().held_bytes
            self._note(f"{share}: {held / 2**30:.2f} GiB held: {_since(started)}")
            is_whole = size >= kv_bytes
            for method in (*self._recorded, *(self._named if is_whole else ())):
                warm_up = range(WARM_STEPS if is_whole else self.options.warm_up)
                repeats = 1 if is_whole else self.options.warm_up_repeats
                numbers = _StepNumbers.after(warm_up, repeats, self.options.steps)
                figures.append(self._time(step, rows, method, share, numbers))
                self._note(str(figures[-1]))
            for slot in rows.slots:
                step.leave(slot)
        return figures

    def _old_figures(self, step: DeviceStep, lengths: tuple[int, ...]) -> list[TierStepFigure]:
        figures = []
        rows = self._joined(step, self._sequences_of(lengths), lengths)
        for method in self._recorded:
            numbers = _StepNumbers.after(range(WARM_STEPS), 1, min(OLD_STEPS, self.options.steps))
            figures.append(self._time(step, rows, method, KvShare(0.0), numbers))
            self._note(str(figures[-1]))
        for slot in rows.slots:
            step.leave(slot)
        return figures

    def _joined(
        self, step: DeviceStep, sequences: list[SequenceKv], lengths: tuple[int, ...]
    ) -> _Rows:
        for sequence, length in zip(sequences, lengths, strict=True):
            sequence.num_tokens = length
            if not sequence.slab_table.is_pinned():
                sequence.slab_table = sequence.slab_table.pin_memory()
        return _Rows(sequences, [step.join(sequence) for sequence in sequences], lengths)

    def _time(
        self,
        step: DeviceStep,
        rows: _Rows,
        method: _Method,
        share: KvShare,
        numbers: _StepNumbers,
    ) -> TierStepFigure:
        regions = [self.window.retrieval_region(length + 1) for length in rows.lengths]
        states = [blank_state(self.planner) for _ in rows.lengths]
        samplers = step_samplers(len(rows.lengths))
        for number, (row, region) in product(numbers.all, enumerate(regions)):
            method.policy(self.config, region, number, row)
        self._marks.follow(method.replay, regions)
        turns = []
        before = _Counters.of(step, 0)
        for count, number in enumerate(numbers.all):
            if count == len(numbers.warm_up):
                before = _Counters.of(step, self._received())
            turns.append(_turn(step, self._begin(rows, method, count, number, states), samplers))
        after = _Counters.of(step, self._received())
        figure = self._figure(
            rows.lengths, method, share, turns[len(numbers.warm_up) :], before, after
        )
        if self.options.kernels:
            last = self._begin(rows, method, 0, numbers.timed[-1], states)
            self._print_kernels(str(figure), step, last)
        return figure

    def _begin(
        self, rows: _Rows, method: _Method, count: int, number: int, states: list[PlannerState]
    ) -> list[StepRow]:
        """Rows of the step that was recorded as `number`, the bench's `count`-th."""
        self._marks.begin_step(number)
        step_rows = []
        for index, sequence in enumerate(rows.sequences):
            # The same step again and again: what the last one appended is overwritten.
            sequence.num_tokens = rows.lengths[index]
            region = self.window.retrieval_region(rows.lengths[index] + 1)
            policy = method.policy(self.config, region, number, index)
            token = (count * 7919 + index) % self.config.vocab_size
            step_rows.append(StepRow(sequence, rows.slots[index], token, policy, states[index]))
        return step_rows

    def _print_kernels(self, title: str, step: DeviceStep, rows: list[StepRow]) -> None:
        lengths = [row.sequence.num_tokens for row in rows]

        def run() -> None:
            for row, length in zip(rows, lengths, strict=True):
                row.sequence.num_tokens = length
            step.run(rows)

        self._console.print(
            kernel_table(title, kernel_times(record_kernels(run, self.options.kernels)))
        )

    def _received(self) -> int:
        if self.nvml is None:
            return 0
        # A look sooner than that after the last one sees nothing.
        time.sleep(MIN_LOOK_SECONDS)
        return self.nvml.read().pcie_bytes.get("host_to_device", 0)

    def _figure(
        self,
        lengths: tuple[int, ...],
        method: _Method,
        share: KvShare,
        turns: Sequence[_Turn],
        before: _Counters,
        after: _Counters,
    ) -> TierStepFigure:
        typical = {
            one.name: median(getattr(turn, one.name) for turn in turns) for one in fields(_Turn)
        }
        selected, count = typical["selected_bytes"], len(turns)
        # Misses come in bursts, and their bytes are added up.
        missed = sum(turn.missed_bytes for turn in turns) / count
        dense = self._dense_milliseconds(len(lengths), max(lengths))
        resident_seconds = (selected - min(selected, missed)) / self.copy_rate
        missed_seconds = missed / (self.host_rate + self.uva_rate)
        return TierStepFigure(
            lengths=lengths,
            policy=method.name,
            is_recorded=method.replay is not None,
            kv=str(share),
            device_kv_bytes=share.of(self._kv_bytes(lengths)),
            held_bytes=after.held_bytes,
            milliseconds=typical["seconds"] * 1e3,
            gpu_milliseconds=typical["gpu_seconds"] * 1e3,
            idle_milliseconds=typical["idle_seconds"] * 1e3,
            sampling_milliseconds=typical["sampling_seconds"] * 1e3,
            selected_bytes=sum(turn.selected_bytes for turn in turns) / count,
            region_bytes=typical["region_bytes"],
            missed_bytes=missed,
            filled_bytes=(after.filled_bytes - before.filled_bytes) / count,
            evicted_bytes=(after.evicted_bytes - before.evicted_bytes) / count,
            scanned_bytes=typical["scanned_bytes"],
            counted_pcie_bytes=(after.pcie_bytes - before.pcie_bytes) / count,
            nvml_pcie_bytes=(after.card_bytes - before.card_bytes) / count,
            dense_milliseconds=dense,
            limit_milliseconds=dense + (resident_seconds + missed_seconds) * 1e3,
        )

    def _note(self, text: str) -> None:
        self._console.print(text, highlight=False)


@dataclass(frozen=True)
class _Rows:
    """Sequences of a batch that have joined."""

    sequences: list[SequenceKv]
    slots: list[int]
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class _StepNumbers:
    """Recorded steps in the order in which they are run."""

    warm_up: list[int]
    timed: list[int]

    @classmethod
    def after(cls, warm_up: range, repeats: int, count: int) -> _StepNumbers:
        """So many steps, after others each of which is run some times."""
        slow = [number for number in warm_up for _ in range(repeats)]
        return cls(slow, list(range(warm_up.stop, warm_up.stop + count)))

    @property
    def all(self) -> list[int]:
        """Numbers of all steps."""
        return self.warm_up + self.timed


@dataclass(frozen=True)
class _Counters:
    """Counters of a device, at one time."""

    filled_bytes: int
    evicted_bytes: int
    held_bytes: int
    pcie_bytes: int
    card_bytes: int

    @classmethod
    def of(cls, step: DeviceStep, card_bytes: int) -> _Counters:
        """Counters of a step's device now."""
        usage = step.usage
        to_device = sum(
            count
            for (direction, _), count in usage.pcie_bytes.items()
            if direction == "host_to_device"
        )
        selection = step.selection
        if selection is None:
            return cls(0, 0, 0, to_device, card_bytes)
        tier = selection.tier.statistics()
        return cls(tier.filled_bytes, tier.evicted_bytes, tier.held_bytes, to_device, card_bytes)


def _turn(step: DeviceStep, rows: Sequence[StepRow], samplers: Sequence[TokenSampler]) -> _Turn:
    start = time.perf_counter()
    logits, reads = step.run(rows)
    sampling = time.perf_counter()
    sample_rows(logits, samplers, step.pool)
    end = time.perf_counter()
    times = step.times()
    selected = sum(read.attended_bytes for read in reads)
    return _Turn(
        seconds=end - start,
        sampling_seconds=end - sampling,
        gpu_seconds=times.total,
        idle_seconds=times.waited_idle,
        selected_bytes=selected,
        missed_bytes=selected - sum(read.resident_bytes for read in reads),
        region_bytes=sum(read.region_bytes for read in reads),
        scanned_bytes=sum(read.scanned_bytes for read in reads),
    )


def restart(tier: DeviceTier, capacity_bytes: int) -> None:
    """Empty a tier that no sequence uses, once its batch has come in."""
    while tier.state is not TierState.IDLE:
        _synchronize()
        tier.before_step()
    tier.restart(capacity_bytes)


def fill_up(tier: DeviceTier) -> None:
    """Let blocks of regions come in until there is no room, or none is left."""
    unchanged = 0
    while unchanged < 3:
        filled = tier.statistics().filled_bytes
        tier.before_step()
        tier.after_step(has_requests=False)
        _synchronize()
        unchanged = unchanged + 1 if tier.statistics().filled_bytes == filled else 0
    tier.before_step()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _since(started: float) -> str:
    return f"{time.perf_counter() - started:.1f} s"


def run_tier_step_bench(console: Console, options: TierStepOptions) -> dict[str, object]:
    """Measure; print as it goes, return everything as plain data."""
    bench = TierStepBench(options, console)
    figures = bench.run()
    gpu = torch.cuda.get_device_name()
    return {
        "about": Provenance.here(
            f"{options.shape}, random weights", commit=options.commit, gpu=gpu
        ).as_json(),
        "machine": describe_machine(options.commit) | {"gpu": gpu},
        "recorded": bench.recorded_abouts,
        "options": asdict(options),
        "sampling": STEP_SAMPLING,
        "copy_gigabytes_per_second": bench.copy_rate / 1e9,
        "host_read_gigabytes_per_second": bench.host_rate / 1e9,
        "uva_gigabytes_per_second": bench.uva_rate / 1e9,
        "exact": [asdict(one) for one in bench.exact],
        "exact_rates": [
            asdict(one) | {"tokens_per_second": one.tokens_per_second} for one in bench.exact_rates
        ],
        "figures": [figure.as_json() for figure in figures],
    }


@dataclass(frozen=True, kw_only=True)
class TierStepCommand(JsonOption, Command):
    """Time a decode step over the share of KV in device memory."""

    options: TierStepOptions = field(default_factory=TierStepOptions)
    """What is measured."""

    def __call__(self) -> None:
        """Print figures as they come; keep them."""
        self.write(run_tier_step_bench(self.console(width=220), self.options))


if __name__ == "__main__":
    sys.exit(run_module(TierStepCommand))
