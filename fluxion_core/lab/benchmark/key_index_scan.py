"""The scan and the build of keys of 2 bits, beside a copy of device memory.

    python -m fluxion_core.lab.benchmark.key_index_scan --batches 4x131072,1x8192 --json out.json

A step's scans, one a layer, are one CUDA graph; a figure is the median time of its launches. Slabs
lie in any order, and layers one after the other as in a step; the index of a long batch is many
times the L2, that of a short one is not, and is read there from the second launch on. Before it is
timed a batch's scores are held to the definition.

The build indexes all groups of one slab, from K and V in device memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Annotated

import torch
from cyclopts import Parameter
from rich.console import Console
from torch import Tensor

from fluxion_core.config.command_options import JsonOption, Numbers, Texts
from fluxion_core.config.commands import Command, run_module, within
from fluxion_core.decode.device.graph import StepGraph
from fluxion_core.errors import ConfigError
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry, WindowSpec, ceil_div
from fluxion_core.kernels.key_index import layout, reference
from fluxion_core.kernels.key_index.launch import KeyIndexKernels, group_list
from fluxion_core.kernels.tier.constants import REGION_BEGIN, REGION_END, ROW_WORDS
from fluxion_core.lab.benchmark.model_shapes import shape_named
from fluxion_core.lab.provenance import Provenance
from fluxion_core.models.config import ModelConfig

_WARM_UPS = 3
_COPIED_BYTES = 2 << 30
_LARGEST_DIFFERENCE = 0.1
"""Of a score from the definition: products of query and step are rounded to float16, and tensor
cores cut sums of subnormal numbers off sooner. What is wrong is off by more than 1."""


class ScanCase:
    """Rows of one length whose index is in device memory: one slab's, as often as they need slabs.

    Args:
        shape: of the model.
        rows: sequences.
        tokens: of each.
        device: where all of it is.
        programs: of a scan.
    """

    def __init__(
        self, shape: ModelConfig, rows: int, tokens: int, device: torch.device, programs: int
    ) -> None:
        self.geometry = KvGeometry(shape.num_layers, shape.num_kv_heads, shape.head_dim)
        self.kernels = KeyIndexKernels(self.geometry, shape.num_heads, programs)
        self.region = WindowSpec().retrieval_region(tokens)
        generator = torch.Generator().manual_seed(tokens)
        slabs = self.geometry.slabs_for(tokens)
        self.kv = self._random_slab(generator).to(device)
        self.index = torch.empty(
            rows * slabs, self.kernels.slab_bytes, dtype=torch.uint8, device=device
        )
        self.build_list = group_list(
            torch.tensor([self.kv.data_ptr()]),
            torch.tensor([self.index.data_ptr()]),
            self.geometry,
            range(self.geometry.slab_tokens),
        ).to(device)
        self.kernels.build(self.build_list)
        self.index[1:] = self.index[0]
        places = torch.randperm(rows * slabs, generator=generator).view(rows, slabs)
        self._table = (self.index.data_ptr() + places * self.kernels.slab_bytes).to(device)
        words = torch.zeros(rows, ROW_WORDS.value, dtype=torch.int64)
        words[:, REGION_BEGIN.value] = self.region.start
        words[:, REGION_END.value] = self.region.stop
        self._words = words.to(device)
        query = torch.randn(rows, shape.num_heads, shape.head_dim, generator=generator)
        self._query = query.bfloat16().to(device)
        stride = ceil_div(len(self.region), BLOCK_TOKENS * 64) * 64
        self._scores = torch.empty(rows, shape.num_heads, stride, device=device)
        self._levels = torch.zeros(rows, shape.num_kv_heads, dtype=torch.int32, device=device)

    def _random_slab(self, generator: torch.Generator) -> Tensor:
        """K and V of a slab, in the layout of the store; channels differ in mean and scale."""
        geometry = self.geometry
        blocks = (geometry.slab_blocks, 2, BLOCK_TOKENS, geometry.head_dim)
        kv = torch.randn(geometry.num_layers, geometry.num_kv_heads, *blocks, generator=generator)
        scale = torch.logspace(-1, 0.5, geometry.head_dim)
        return (kv * scale + torch.linspace(-4, 4, geometry.head_dim)).bfloat16()

    @property
    def read_bytes(self) -> int:
        """Bytes that the scans of a step read."""
        first = self.region.start // reference.GROUP_TOKENS
        groups = ceil_div(self.region.stop, reference.GROUP_TOKENS) - first
        heads = self.geometry.num_layers * self.geometry.num_kv_heads * len(self._query)
        return heads * groups * layout.group_bytes(self.geometry.head_dim)

    def scan(self, level: int) -> None:
        """Launch the scans of a step, all groups at one level."""
        self._levels.fill_(level)
        for layer in range(self.geometry.num_layers):
            self.scan_layer(layer)

    def scan_layer(self, layer: int) -> None:
        """Launch the scan of a layer, at the last level."""
        self.kernels.scan(layer, self._words, self._table, self._levels, self._query, self._scores)

    def difference(self, level: int) -> float:
        """Largest difference of a score of the last layer, row and KV head from the definition."""
        self._levels.fill_(level)
        self.scan_layer(self.geometry.num_layers - 1)
        group = self.kernels.group
        own = self._scores[-1, -group:].cpu()
        heads = (self.geometry.num_layers * self.geometry.num_kv_heads, self.kernels.slab_groups)
        packed = self.index[0].view(*heads, -1)[-1].cpu()
        index = layout.unpack(packed, self.geometry.head_dim)
        units = reference.unit_scores(self._query[-1, -group:].cpu(), index)
        # All slabs are the same one.
        repeated = units.repeat(1, self._table.shape[1])
        begin, end = (edge // BLOCK_TOKENS for edge in (self.region.start, self.region.stop))
        expected = reference.level_scores(repeated, begin, end, level)
        return float((own[:, : expected.shape[1]] - expected).abs().max())


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class KeyIndexScanOptions:
    """Measurements to make."""

    shape: str = "llama-3.1-8b"
    """Model shape."""
    batches: Texts = ("4x131072", "1x8192")
    """Sequences of a step, and tokens of each."""
    levels: Numbers = (0, 3)
    """Block sizes, as indices: 0 for 16 tokens, 3 for 128."""
    programs: Numbers = (1584, 2112)
    """Of a scan, at most."""
    repeats: Annotated[int, within(1)] = 30
    """Launches; medians are told."""


@dataclass(frozen=True)
class KeyIndexFigure:
    """All layers of one batch."""

    what: str
    batch: str
    milliseconds: float
    read_bytes: int
    share_of_copy: float
    """Of a plain copy's rate, which counts what it reads and what it writes."""
    difference: float
    """Largest of a score from the definition; 0 for the build."""


class KeyIndexScanBench:
    """Measures on the current CUDA device; keeps and prints figures."""

    def __init__(self, console: Console, options: KeyIndexScanOptions) -> None:
        self.figures: list[KeyIndexFigure] = []
        self._console, self._options = console, options
        self._shape = shape_named(options.shape)
        self._device = torch.device("cuda")
        self._stream = torch.cuda.Stream(self._device)
        source = torch.ones(_COPIED_BYTES, dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        self.copy_rate = 2 * _COPIED_BYTES / self._seconds(lambda: target.copy_(source))
        """Bytes per second, read and written."""

    def run(self) -> None:
        """Measure everything that is asked for.

        Raises:
            ConfigError: a batch is none, or scores are not those of the definition.
        """
        for batch in self._options.batches:
            rows, tokens = parse_batch(batch)
            for programs in self._options.programs:
                case = ScanCase(self._shape, rows, tokens, self._device, programs)
                for level in self._options.levels:
                    self._measure_scan(case, batch, programs, level)
                self._measure_build(case, programs == self._options.programs[0])
                del case

    def _measure_scan(self, case: ScanCase, batch: str, programs: int, level: int) -> None:
        difference = case.difference(level)
        if difference > _LARGEST_DIFFERENCE:
            raise ConfigError(f"scores of {batch} are {difference:g} from the definition")
        seconds = self._seconds(lambda: case.scan(level))
        what = f"scan, level {level}, {programs} programs"
        self._add(what, batch, seconds, case.read_bytes, difference)

    def _measure_build(self, case: ScanCase, is_wanted: bool) -> None:
        if is_wanted:
            seconds = self._seconds(lambda: case.kernels.build(case.build_list))
            # K alone.
            self._add("build", f"{case.geometry.slab_tokens}", seconds, case.kv.nbytes // 2, 0.0)

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
        self, what: str, batch: str, seconds: float, read_bytes: int, difference: float
    ) -> None:
        share = read_bytes / seconds / self.copy_rate
        figure = KeyIndexFigure(what, batch, seconds * 1e3, read_bytes, share, difference)
        self.figures.append(figure)
        self._console.print(
            f"{batch:10s} {what:32s} {figure.milliseconds:8.3f} ms  {read_bytes / 1e6:8.1f} MB  "
            f"{read_bytes / seconds / 1e9:7.0f} GB/s  {share:6.1%} of a copy's  "
            f"difference {difference:.4f}",
            highlight=False,
        )


def parse_batch(text: str) -> tuple[int, int]:
    """Rows and tokens of a batch, as in 4x131072.

    Raises:
        ConfigError: it is none.
    """
    rows, _, tokens = text.partition("x")
    if not (rows.isdecimal() and tokens.isdecimal() and int(rows) > 0 and int(tokens) >= 1024):
        raise ConfigError(f"batch {text!r}; rows and tokens of each, from 1024 on, as in 4x131072")
    return int(rows), int(tokens)


@dataclass(frozen=True, kw_only=True)
class KeyIndexScanCommand(JsonOption, Command):
    """Measure the scan and the build of keys of 2 bits. Needs a CUDA device."""

    options: KeyIndexScanOptions = field(default_factory=KeyIndexScanOptions)
    """What is measured."""

    def __call__(self) -> None:
        """Print figures; keep them."""
        console = self.console(width=160)
        bench = KeyIndexScanBench(console, self.options)
        about = Provenance.of_shape(self.options.shape, gpu=torch.cuda.get_device_name())
        console.print(f"copy {bench.copy_rate / 1e9:.0f} GB/s; {about.machine}", highlight=False)
        bench.run()
        self.write(
            {
                "about": about.as_json(),
                "options": asdict(self.options),
                "copy_bytes_per_second": bench.copy_rate,
                "figures": [asdict(figure) for figure in bench.figures],
            }
        )


if __name__ == "__main__":
    sys.exit(run_module(KeyIndexScanCommand))
