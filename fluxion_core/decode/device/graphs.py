"""The device's side of a decode step: one CUDA graph for each size of batch, captured at start.

In each layer a graph publishes queries, keys and values on the board and attends to the windows,
makes plans if there are any to make, waits for the host's flag, and merges what the host attended
to. Where the device selects, it does so behind the plans, attends to what is resident, and waits
only if something is missing (selection.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from fluxion_core.decode.device.board import STUCK_NS, Board
from fluxion_core.decode.device.graph import StepGraph
from fluxion_core.decode.device.planner import DevicePlanner, LayerPlans
from fluxion_core.decode.device.selected_layers import SelectedLayers
from fluxion_core.decode.device.selection import DeviceSelection
from fluxion_core.decode.device.windows import DeviceWindows
from fluxion_core.geometry import KvGeometry
from fluxion_core.kernels.dense_attention.triton import WindowAttention
from fluxion_core.kernels.handover.launch import Handover, Publication
from fluxion_core.models.decoder import Decoder


class StepGraphs:
    """Graphs for powers of two of rows up to a capacity, and for the capacity.

    Where the device selects, each of them in two: where all regions are short, a layer is a launch
    less, of which a step of a short sequence mostly consists.

    Args:
        decoder: the model, on a CUDA device.
        board: through which layers are handed over.
        windows: of the sequences in all slots.
        attention: over the windows.
        planner: makes plans; None where the host makes them all.
        selection: selects what is read; None where the host does.
        step_number: [1] int32 on the device; goes up by one a launch.
        max_rows: sequences of a step.
        stream: to capture on, and to launch on.
    """

    def __init__(
        self,
        decoder: Decoder,
        board: Board,
        windows: DeviceWindows,
        attention: WindowAttention,
        planner: DevicePlanner | None,
        selection: DeviceSelection | None,
        *,
        step_number: Tensor,
        max_rows: int,
        stream: torch.cuda.Stream,
    ) -> None:
        self._decoder, self._planner, self._stream = decoder, planner, stream
        self._selection = selection
        self._geometry = windows.geometry
        self.board, self.windows = board, windows
        self.attention = attention
        self.step_number = step_number
        """On the device: goes up by one a launch."""
        sizes = sorted({min(1 << power, max_rows) for power in range(max_rows.bit_length() + 1)})
        ways = (False, True) if planner is not None else (False,)
        lengths = selection.lengths if selection is not None else (False,)
        self._graphs = {
            key: self._capture(key[0], plans=key[1], short=key[2])
            for key in product(sizes, ways, lengths)
        }
        self.launches = int(self.step_number.item())
        """So far, captures' included: the number of the newest step."""

    def launch(
        self,
        num_rows: int,
        *,
        has_plans: bool,
        is_short: bool,
        events: Sequence[torch.cuda.Event],
    ) -> int:
        """Launch the smallest graph that takes so many rows; returns its rows, padding included.

        Args:
            num_rows: of the step, up to the capacity.
            has_plans: whether plans are made for some of them.
            is_short: whether the device selects, from short regions alone.
            events: recorded before the graph and after it.

        Raises:
            DeviceError: CUDA refuses.
        """
        size = min(size for size, *_ in self._graphs if size >= num_rows)
        graph = self._graphs[size, has_plans, is_short]
        self.launches += 1
        events[0].record(self._stream)
        graph.launch()
        events[1].record(self._stream)
        return size

    def _capture(self, size: int, *, plans: bool, short: bool) -> StepGraph:
        board, device = self.board, self.step_number.device
        words = torch.zeros(2, size, dtype=torch.int64, device=device)
        ints = torch.zeros(2, size, dtype=torch.int32, device=device)
        selected = self._selection.new_layers(size, is_short=short) if self._selection else None
        planner = None
        if self._planner and plans:
            planner = self._planner.new_layers(size, device_tells=selected is not None)
        rows = ints[0], ints[1]
        port: _GraphAttention = (
            _GraphAttention(self, self._geometry, size, rows, planner)
            if selected is None
            else _SelectedAttention(self, self._geometry, size, rows, planner, selected)
        )

        @torch.inference_mode()
        def body() -> None:
            for index in range(2):
                words[index].copy_(board.input_words[index, :size], non_blocking=True)
                ints[index].copy_(board.input_rows[index, :size], non_blocking=True)
            self.step_number.add_(1)
            if selected is not None:
                selected.begin()
            if planner is not None:
                planner.begin()
            hidden = self._decoder(words[0], words[1], port)
            board.logits[:size].copy_(self._decoder.logits(hidden), non_blocking=True)
            board.stamps.copy_(port.stamps, non_blocking=True)
            if selected is not None:
                selected.end()

        return StepGraph(body, self._stream)


class _GraphAttention:
    """Attention port that only launches: everything the kernels read is where it always is.

    Args:
        graphs: whose board and windows are used.
        geometry: of the store.
        size: rows.
        rows: window slots, and lengths with the new token, both [rows] int32 on the device.
        planner: makes plans for some of the rows.
    """

    def __init__(
        self,
        graphs: StepGraphs,
        geometry: KvGeometry,
        size: int,
        rows: tuple[Tensor, Tensor],
        planner: LayerPlans | None,
    ) -> None:
        self._graphs, self._size = graphs, size
        self._slots, self._lengths = rows
        self._planner = planner
        device = self._slots.device
        self._attention = graphs.attention
        self._handover = Handover(
            self._attention.num_heads,
            geometry.num_kv_heads,
            geometry.head_dim,
            self._attention.num_splits,
        )
        self._states = self._attention.make_states(size, device)
        self._has_answer = torch.zeros(1, dtype=torch.int32, device=device)
        self.stamps = torch.zeros(geometry.num_layers, 3, dtype=torch.int64, device=device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend in one layer; see AttentionPort: only launches."""
        graphs, board = self._graphs, self._graphs.board
        publication = Publication(
            key,
            value,
            board.device_queries,
            board.rows[layer],
            board.published[layer],
            graphs.step_number,
            self.stamps[layer, 0:1],
        )
        self._attend_windows(layer, query, publication)
        if self._planner is not None:
            self._plan(layer, self._planner)
        output = torch.empty(self._size, *query.shape[1:], dtype=query.dtype, device=query.device)
        self._end(layer, query, output)
        return output

    def _attend_windows(self, layer: int, query: Tensor, publication: Publication) -> None:
        windows = self._graphs.windows
        window = windows.key(layer), windows.value(layer)
        rows = self._slots, self._lengths
        self._attention.launch(query, *window, *rows, self._states, publication)

    def _plan(self, layer: int, planner: LayerPlans) -> None:
        board = self._graphs.board
        planner.launch(
            layer,
            self._slots,
            self._lengths,
            board.device_queries[: self._size],
            self._graphs.windows.key(layer),
            self._states,
            board.plan_levels[layer],
            board.plan_budgets[layer],
            board.planned[layer],
            self._graphs.step_number,
            kept=self._kept_plans(layer),
        )

    def _kept_plans(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Where the device keeps a layer's plans for itself."""
        del layer
        return None

    def _end(self, layer: int, query: Tensor, output: Tensor) -> None:
        """Wait for the host, and merge what it attended to."""
        del query
        board = self._graphs.board
        self._handover.await_and_merge(
            self._states.output,
            self._states.lse,
            board.output,
            board.lse,
            board.answered[layer : layer + 1],
            board.skip[layer : layer + 1],
            self._graphs.step_number,
            board.error,
            self.stamps[layer, 1:3],
            self._has_answer,
            output,
            timeout_ns=STUCK_NS,
            error_code=layer + 1,
        )


class _SelectedAttention(_GraphAttention):
    """Attention port of a graph that selects for its rows.

    Args:
        graphs: whose board and windows are used.
        geometry: of the store.
        size: rows.
        rows: as of _GraphAttention.
        planner: likewise.
        selected: launches of the selection.
    """

    def __init__(
        self,
        graphs: StepGraphs,
        geometry: KvGeometry,
        size: int,
        rows: tuple[Tensor, Tensor],
        planner: LayerPlans | None,
        selected: SelectedLayers,
    ) -> None:
        super().__init__(graphs, geometry, size, rows, planner)
        self._selected = selected

    def _kept_plans(self, layer: int) -> tuple[Tensor, Tensor] | None:
        return self._selected.plan(layer)

    def _end(self, layer: int, query: Tensor, output: Tensor) -> None:
        """Select, attend to what is resident, wait if something is missing, and merge all parts."""
        planner, board = self._planner, self._graphs.board
        stamps = self.stamps[layer, 1:3]
        self._selected.select(layer, query)
        self._selected.attend_and_await(layer, query, board, stamps, timeout_ns=STUCK_NS)
        memory = None
        if planner is not None:
            memory = planner.rows, self._slots, planner.told[layer]
        self._selected.merge(layer, board, self._states, output, memory)
