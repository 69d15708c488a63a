"""Attention over units in device memory, beside a copy of it and torch's own attention.

    python -m fluxion_core.lab.benchmark.resident_attention --units 8192,1638,410 --rows 1,4
    --lists even,uneven --programs 384,512,768 --stages 2,3,4 --tiles 8,16,32 --json out.json

Lists are of random slots, spread over the whole tier, each head reads each of its group's units.
Even lists have `units` each; of uneven ones the first has up to four times as many, and each half
as many as the one before. A figure is the median of launches of a CUDA graph, for one launch of
the kernel; each launch in a graph has lists of its own, so that none finds its units in the L2.
Beside it are the end of a layer of which nothing misses, and torch's attention over contiguous KV
of as many tokens, which is the same each time: what fits into the L2 comes from there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import product
from statistics import median
from typing import Annotated

import torch
from cyclopts import Parameter
from rich.console import Console
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fluxion_core.config.command_options import JsonOption, Numbers, Texts
from fluxion_core.config.commands import Command, run_module, within
from fluxion_core.decode.device.graph import StepGraph
from fluxion_core.errors import ConfigError
from fluxion_core.geometry import BLOCK_TOKENS, WindowSpec, ceil_div
from fluxion_core.kernels.dense_attention.triton import WindowAttention
from fluxion_core.kernels.tier.attention import ResidentAttention, ResidentStates
from fluxion_core.kernels.tier.constants import RESIDENT, SELECTED
from fluxion_core.kernels.tier.merge import HostStates, TierMerge
from fluxion_core.lab.benchmark.model_shapes import shape_named
from fluxion_core.lab.benchmark.report import describe_machine

_WARM_UPS = 3
_COLD_BYTES = 1 << 30
"""What a graph's launches list together, at least: many times the L2."""
_MOST_LAUNCHES = 64


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ResidentAttentionOptions:
    """Measurements to make."""

    shape: str = "llama-3.1-8b"
    """Model shape."""
    rows: Numbers = (1, 4)
    """Sequences of a step."""
    units: Numbers = (8192, 1638, 410, 32)
    """16-token blocks of each KV head of each row."""
    lists: Texts = ("even", "uneven")
    """Which lists."""
    programs: Numbers = (512,)
    """Of a launch, about."""
    stages: Numbers = (3,)
    """Tiles of a program."""
    tiles: Numbers = (16,)
    """KiB of a tile."""
    tier_gib: Annotated[float, within(0)] = 8.0
    """Of device memory; units lie anywhere in it."""
    repeats: Annotated[int, within(1)] = 30
    """Launches of a graph; medians are told."""


@dataclass(frozen=True)
class ResidentAttentionFigure:
    """One kernel over one kind of lists, per launch."""

    what: str
    rows: int
    lists: str
    units: int
    microseconds: float
    read_bytes: int
    share_of_copy: float
    """Of a plain copy's rate, which counts what it reads and what it writes."""


@dataclass(frozen=True)
class _Lists:
    """Lists of one launch: slots, masks and counts, and how many bytes they are."""

    slots: Tensor
    masks: Tensor
    counts: Tensor
    read_bytes: int


class ResidentAttentionBench:
    """Measures on the current CUDA device; keeps and prints figures.

    Raises:
        ConfigError: there is no such shape, or no such lists, or the tier has fewer slots than a
            launch lists.
    """

    def __init__(self, console: Console, options: ResidentAttentionOptions) -> None:
        self.figures: list[ResidentAttentionFigure] = []
        self._console, self._options = console, options
        self._shape = shape_named(options.shape)
        self._device = torch.device("cuda")
        self._unit_bytes = 4 * BLOCK_TOKENS * self._shape.head_dim
        self._num_slots = int(options.tier_gib * 2**30) // self._unit_bytes
        largest = max(options.rows) * self._shape.num_kv_heads * max(options.units)
        if largest > self._num_slots:
            raise ConfigError(f"{largest} units of a launch, {self._num_slots} slots of the tier")
        if unknown := set(options.lists) - {"even", "uneven"}:
            raise ConfigError(f"lists {', '.join(sorted(unknown))}; even, uneven")
        units = torch.empty(
            self._num_slots, self._unit_bytes // 2, dtype=torch.bfloat16, device=self._device
        )
        self._tier = units.normal_().view(torch.uint8)
        self._stream = torch.cuda.Stream(self._device)
        self.copy_rate = self._measure_copy()
        """Bytes per second, read and written."""

    def run(self) -> None:
        """Measure everything that is asked for."""
        options = self._options
        for rows in options.rows:
            for units in options.units:
                self._measure_torch(rows, units)
                for kind in options.lists:
                    lists = self._make_lists(rows, units, kind)
                    self._measure_lists(lists, rows, units, kind)

    def _measure_lists(self, lists: list[_Lists], rows: int, units: int, kind: str) -> None:
        shape, options = self._shape, self._options
        query = torch.randn(rows, shape.num_heads, shape.head_dim, device=self._device)
        for programs, stages, tile in product(options.programs, options.stages, options.tiles):
            attention = ResidentAttention(
                shape.num_heads,
                shape.num_kv_heads,
                shape.head_dim,
                programs=programs,
                stages=stages,
                tile_bytes=tile << 10,
            )
            states = attention.make_states(rows, self._device)

            def body(
                attention: ResidentAttention = attention, states: ResidentStates = states
            ) -> None:
                for one in lists:
                    attention.launch(query, self._tier, one.slots, one.masks, one.counts, states)

            what = f"{programs} programs, {stages} stages, {tile} KiB"
            seconds = self._seconds(body) / len(lists)
            self._add(what, rows, kind, units, seconds, lists[0].read_bytes)
        end = self._layer_end(states, lists[0].counts, rows)
        self._add("end of the layer", rows, kind, units, self._seconds(end), 0)

    def _layer_end(self, states: ResidentStates, counts: Tensor, rows: int) -> Callable[[], None]:
        """Launches of the end of a layer of which nothing misses."""
        shape, device = self._shape, self._device
        heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
        window = WindowAttention(WindowSpec(), *heads).make_states(rows, device)
        for part in window:
            part.normal_()
        end = TierMerge(*heads)
        has_answer = torch.zeros(1, dtype=torch.int32, device=device)
        output = torch.empty(rows, heads[0], heads[2], dtype=torch.bfloat16, device=device)
        host = HostStates(output.float(), window.lse[:, :, 0].contiguous())

        def body() -> None:
            end.merge(window, states, host, counts, has_answer, output, None)

        return body

    def _measure_torch(self, rows: int, units: int) -> None:
        shape = self._shape
        tokens = units * BLOCK_TOKENS
        kv_shape = (rows, shape.num_kv_heads, tokens, shape.head_dim)
        key, value = torch.randn(2, *kv_shape, dtype=torch.bfloat16, device=self._device)
        query = torch.randn(rows, shape.num_heads, 1, shape.head_dim, device=self._device)
        query = query.bfloat16()
        folded = query.reshape(rows, shape.num_kv_heads, -1, shape.head_dim)
        read_bytes = 2 * key.nbytes

        def grouped() -> None:
            scaled_dot_product_attention(query, key, value, enable_gqa=True)

        def as_queries() -> None:
            scaled_dot_product_attention(folded, key, value)

        for name, body in (("grouped heads", grouped), ("a group's heads as queries", as_queries)):
            seconds = self._seconds(body)
            self._add(f"torch, {name}", rows, "contiguous", units, seconds, read_bytes)

    def _make_lists(self, rows: int, units: int, kind: str) -> list[_Lists]:
        """Lists of a graph's launches, as many as do not fit into the L2 together."""
        shape = self._shape
        groups = rows * shape.num_kv_heads
        lengths = [units] * groups
        if kind == "uneven":
            lengths = [min(4 * units, max(1, (groups * units) >> (1 + i))) for i in range(groups)]
        total = sum(lengths)
        count = min(_MOST_LAUNCHES, max(1, ceil_div(_COLD_BYTES, total * self._unit_bytes)))
        return [self._make_list(rows, lengths) for _ in range(count)]

    def _make_list(self, rows: int, lengths: list[int]) -> _Lists:
        shape, device = self._shape, self._device
        stride = ceil_div(max(lengths), 64) * 64
        room = (rows, shape.num_kv_heads, stride)
        slots = torch.randint(0, self._num_slots, room, dtype=torch.int32, device=device)
        masks = torch.full(
            room, (1 << shape.num_heads // shape.num_kv_heads) - 1, dtype=torch.int32, device=device
        )
        counts = torch.zeros(rows, shape.num_kv_heads, 2, dtype=torch.int32)
        for word in (SELECTED, RESIDENT):
            counts[..., word.value] = torch.tensor(lengths).reshape(rows, -1)
        return _Lists(slots, masks, counts.to(device), sum(lengths) * self._unit_bytes)

    def _measure_copy(self) -> float:
        half = self._num_slots // 2
        source, target = self._tier[:half], self._tier[half : 2 * half]
        seconds = self._seconds(lambda: target.copy_(source))
        return 2 * source.nbytes / seconds

    def _seconds(self, body: Callable[[], object]) -> float:
        """Median time of a graph of what `body` launches."""
        graph = StepGraph(body, self._stream)
        times = []
        for _ in range(_WARM_UPS + self._options.repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(self._stream)
            graph.launch()
            end.record(self._stream)
            end.synchronize()
            times.append(float(begin.elapsed_time(end)) / 1e3)
        return median(times[_WARM_UPS:])

    def _add(
        self, what: str, rows: int, lists: str, units: int, seconds: float, read_bytes: int
    ) -> None:
        share = read_bytes / seconds / self.copy_rate
        figure = ResidentAttentionFigure(what, rows, lists, units, seconds * 1e6, read_bytes, share)
        self.figures.append(figure)
        self._console.print(
            f"{rows:3d} rows  {lists:10s} {units:6d} units  {what:50s} "
            f"{figure.microseconds:9.1f} us  {read_bytes / 1e6:8.1f} MB  "
            f"{read_bytes / seconds / 1e9:7.0f} GB/s  {share:6.1%} of a copy's",
            highlight=False,
        )


@dataclass(frozen=True, kw_only=True)
class ResidentAttentionCommand(JsonOption, Command):
    """Measure attention over units in device memory. Needs a CUDA device."""

    options: ResidentAttentionOptions = field(default_factory=ResidentAttentionOptions)
    """What is measured."""

    def __call__(self) -> None:
        """Print figures; keep them."""
        console = self.console(width=160)
        bench = ResidentAttentionBench(console, self.options)
        machine = {**describe_machine(), "gpu": torch.cuda.get_device_name()}
        console.print(f"copy {bench.copy_rate / 1e9:.0f} GB/s; {machine}", highlight=False)
        bench.run()
        self.write(
            {
                "machine": machine,
                "options": asdict(self.options),
                "copy_bytes_per_second": bench.copy_rate,
                "figures": [asdict(figure) for figure in bench.figures],
            }
        )


if __name__ == "__main__":
    sys.exit(run_module(ResidentAttentionCommand))
