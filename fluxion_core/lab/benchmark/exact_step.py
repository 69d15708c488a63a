"""Exact attention with all KV in device memory: what a step on a GPU with room is measured against.

The same decoder as the step's, in one CUDA graph, with the attention that torch has. KV is random
bytes; a step writes its own key and value over the last ones. Three ways:

    sdpa          scaled_dot_product_attention, which does not split KV
    flash splits  torch's flash kernel over pieces of the KV, as if they were sequences of their
                  own, whose outputs are merged by their lse: flash decoding by hand
    flex          flex_attention, compiled, which splits KV itself

The fastest is what counts. Beside them the limit: bytes of KV at the measured rate of copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F  # noqa: N812
from rich.console import Console
from torch import Tensor

from fluxion_core.decode.device.graph import StepGraph
from fluxion_core.geometry import KvGeometry
from fluxion_core.models.decoder import Decoder

RIVALS = ("sdpa", "flash splits", "flex")

REPEATS = 20
"""Steps that are timed."""

SPLIT_PROGRAMS = 1056
"""Pieces of all rows and KV heads, about: eight for each of 132 multiprocessors."""

_WARM_UPS = 3

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""[rows, heads, dim] bfloat16 queries over one layer's keys and values, laid out by the way."""


@dataclass(frozen=True)
class ExactFigure:
    """One way. Medians."""

    way: str
    rows: int
    tokens: int
    """Of each row."""
    milliseconds: float
    """From the graph's first kernel to its last."""
    kv_bytes: int
    """Read by a step, and held in device memory."""
    limit_milliseconds: float
    """The dense step alone, and the bytes at the rate of copies."""


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Over keys and values of [rows, kv_heads, tokens, dim]; [rows, heads, dim]."""
    return F.scaled_dot_product_attention(query[:, :, None], key, value, enable_gqa=True)[:, :, 0]


def flash_splits(query: Tensor, key: Tensor, value: Tensor, *, splits: int) -> Tensor:
    """Over keys and values of [rows * splits, kv_heads, tokens / splits, dim]; [rows, heads, dim].

    The heads of a group are the query's positions, so that KV is read once for all of them.
    """
    rows, heads, dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(rows, 1, kv_heads, heads // kv_heads, dim)
    spread = grouped.expand(-1, splits, -1, -1, -1).reshape(rows * splits, *grouped.shape[2:])
    outputs, lses = _flash(spread, key, value)
    lse = lses.reshape(rows, splits, kv_heads, heads // kv_heads, 1)
    weights = torch.softmax(lse, dim=1)
    merged = (outputs.reshape(rows, splits, *grouped.shape[2:]) * weights).sum(1)
    return merged.reshape(rows, heads, dim).to(query.dtype)


def _flash(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and lse [batch, heads, positions] of torch's flash kernel."""
    if query.is_cuda:
        both = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)
    else:
        both = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    return both[0], both[1]


def flex() -> Attention:
    """flex_attention, compiled; over keys and values like sdpa's.

    Raises:
        RuntimeError: at a call, if it cannot be compiled here.
    """
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended = compiled(query[:, :, None], key, value, enable_gqa=True)
        assert isinstance(attended, Tensor)
        return attended[:, :, 0]

    return attend


def splits_for(rows: int, kv_heads: int, tokens: int) -> int:
    """Pieces of a row: a power of two that leaves pieces of 256 tokens or more."""
    splits = 1
    while rows * kv_heads * splits * 2 <= SPLIT_PROGRAMS and tokens // (splits * 2) >= 256:
        splits *= 2
    return splits


class ExactStep:
    """Steps of rows of one length, exact, with all KV in device memory.

    Args:
        decoder: on a CUDA device, in bfloat16.
        geometry: of the KV.
        copy_rate: bytes per second that a copy reads and writes; see `measure_copies`.
    """

    def __init__(self, decoder: Decoder, geometry: KvGeometry, copy_rate: float) -> None:
        self._decoder, self._geometry, self._copy_rate = decoder, geometry, copy_rate

    def measure(
        self,
        rows: int,
        tokens: int,
        dense_milliseconds: float,
        rivals: Sequence[str],
        console: Console,
    ) -> list[ExactFigure]:
        """Figures of every way that is wanted and runs here.

        Args:
            rows: of the step.
            tokens: of each row; cut to a multiple of the pieces.
            dense_milliseconds: of the dense step alone.
            rivals: ways, of RIVALS.
            console: is told what does not run.
        """
        geometry, device = self._geometry, self._decoder.embedding.device
        splits = splits_for(rows, geometry.num_kv_heads, tokens)
        tokens -= tokens % splits
        layers, heads, dim = geometry.num_layers, geometry.num_kv_heads, geometry.head_dim
        whole = (layers, 2, rows, heads, tokens, dim)
        kv = torch.empty(whole, dtype=torch.bfloat16, device=device)
        for layer in kv:
            layer.normal_()
        pieces = (layers, 2, rows * splits, heads, tokens // splits, dim)
        ways: dict[str, tuple[Attention, Tensor]] = {
            "sdpa": (sdpa, kv),
            "flash splits": (partial(flash_splits, splits=splits), kv.view(pieces)),
            "flex": (flex(), kv),
        }
        limit = dense_milliseconds + kv.nbytes / self._copy_rate * 1e3
        figures = []
        for name in rivals:
            attend, layout = ways[name]
            try:
                milliseconds = self._time(attend, layout, rows, tokens)
            except RuntimeError as error:
                console.print(f"exact, {name}: does not run here: {error}", highlight=False)
                continue
            figures.append(ExactFigure(name, rows, tokens, milliseconds, kv.nbytes, limit))
            console.print(
                f"exact, {rows} x {tokens:,} in HBM, {name}: {milliseconds:.2f} ms; "
                f"{kv.nbytes / 2**30:.1f} GiB, limit {limit:.2f} ms",
                highlight=False,
            )
        return figures

    def _time(self, attend: Attention, kv: Tensor, rows: int, tokens: int) -> float:
        device, decoder = kv.device, self._decoder
        token_ids = torch.arange(rows, device=device)
        positions = torch.full((rows,), tokens - 1, device=device)
        port = _KvPort(attend, kv)

        @torch.inference_mode()
        def body() -> Tensor:
            return decoder.logits(decoder(token_ids, positions, port))

        body()  # What has to be compiled is, outside of any capture.
        graph, times = StepGraph(body, torch.cuda.Stream(device)), []
        for _ in range(_WARM_UPS + REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(graph.stream)
            graph.launch()
            end.record(graph.stream)
            end.synchronize()
            times.append(float(begin.elapsed_time(end)))
        return median(times[_WARM_UPS:])


class _KvPort:
    """Attention port over KV in device memory: [layers, 2, batch, kv_heads, tokens, dim]."""

    def __init__(self, attend: Attention, kv: Tensor) -> None:
        self._attend, self._kv = attend, kv

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See AttentionPort; only launches."""
        keys, values = self._kv[layer]
        last = keys.shape[0] // query.shape[0]
        # The last piece of each row takes its newest token.
        keys[last - 1 :: last, :, -1] = key
        values[last - 1 :: last, :, -1] = value
        return self._attend(query, keys, values)


def measure_copies(device: torch.device, *, size_bytes: int = 4 << 30, repeats: int = 9) -> float:
    """Bytes per second that copies within device memory read and write, both counted."""
    source, target = (torch.empty(size_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return float(2 * size_bytes / median(seconds[1:]))
