"""The dense part of a decode step alone: what a step on a GPU is measured against.

The same decoder, windows and kernels as in decode/device/step.py, as one CUDA graph, without a
hand-over: everything that the step would put into pinned memory stays on the device, nothing waits,
and nothing but this is done.
"""

from __future__ import annotations

from statistics import median

import torch
from torch import Tensor

from fluxion_core.decode.device.graph import StepGraph
from fluxion_core.decode.device.windows import DeviceWindows
from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.kernels.dense_attention.triton import WindowAttention
from fluxion_core.kernels.handover.launch import Handover, Publication
from fluxion_core.models.decoder import Decoder

_WARM_UPS = 3


class DenseStep:
    """A step of `rows` sequences whose heads attend to their windows and to nothing else.

    Args:
        decoder: on a CUDA device.
        geometry: of the KV.
        window: whose tokens are attended to.
        rows: of the step.
        context_tokens: of each sequence; the window is full.
    """

    def __init__(
        self,
        decoder: Decoder,
        geometry: KvGeometry,
        window: WindowSpec,
        rows: int,
        context_tokens: int,
    ) -> None:
        device = decoder.embedding.device
        tokens = torch.arange(rows, device=device)
        positions = torch.full((rows,), context_tokens, device=device)
        windows = DeviceWindows(geometry, window, rows, device)
        windows.tensors.normal_()
        port = _WindowPort(decoder, geometry, window, windows, positions.int() + 1)

        @torch.inference_mode()
        def body() -> Tensor:
            return decoder.logits(decoder(tokens, positions, port))

        self._graph = StepGraph(body, torch.cuda.Stream(device))

    def milliseconds(self, repeats: int) -> float:
        """Median time from the graph's first kernel to its last."""
        stream, times = self._graph.stream, []
        for _ in range(_WARM_UPS + repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            self._graph.launch()
            end.record(stream)
            end.synchronize()
            times.append(float(begin.elapsed_time(end)))
        return median(times[_WARM_UPS:])


class _WindowPort:
    """Attention port: a token into its window, attention over the window, its parts merged."""

    def __init__(
        self,
        decoder: Decoder,
        geometry: KvGeometry,
        window: WindowSpec,
        windows: DeviceWindows,
        lengths: Tensor,
    ) -> None:
        heads, kv_heads, dim = decoder.config.num_heads, geometry.num_kv_heads, geometry.head_dim
        device, rows = lengths.device, len(lengths)
        self._windows, self._lengths = windows, lengths
        self._slots = torch.arange(rows, dtype=torch.int32, device=device)
        self._attention = WindowAttention(window, heads, kv_heads, dim)
        self._handover = Handover(heads, kv_heads, dim, self._attention.num_splits)
        self._states = self._attention.make_states(rows, device)
        self._queries = torch.zeros(rows, heads, dim, device=device)
        self._rows = torch.zeros(rows, (heads + 2 * kv_heads) * dim, device=device)
        self._flags = torch.zeros(rows, dtype=torch.int32, device=device)
        self._step = torch.zeros(1, dtype=torch.int32, device=device)
        self._has_answer = torch.zeros(1, dtype=torch.int32, device=device)
        self._stamp = torch.zeros(1, dtype=torch.int64, device=device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See AttentionPort; only launches."""
        windows = (self._windows.key(layer), self._windows.value(layer))
        publication = Publication(
            key, value, self._queries, self._rows, self._flags, self._step, self._stamp
        )
        self._attention.launch(
            query, *windows, self._slots, self._lengths, self._states, publication
        )
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        self._handover.merge(
            self._states.output,
            self._states.lse,
            self._queries,
            self._states.lse,
            self._has_answer,
            output,
        )
        return output
