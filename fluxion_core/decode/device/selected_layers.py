"""Launches of a step's graph that selects for its rows, and reads what is resident."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fluxion_core.decode.device.board import Board
from fluxion_core.kernels.dense_attention.triton import WindowStates
from fluxion_core.kernels.tier.merge import HostStates, ReadMemory
from fluxion_core.kernels.tier.selection import HostLists

if TYPE_CHECKING:
    from fluxion_core.decode.device.selection import DeviceSelection


class SelectedLayers:
    """Launches of a graph that selects for its rows.

    Args:
        selection: of the body.
        size: rows.
    """

    def __init__(self, selection: DeviceSelection, size: int) -> None:
        self._selection, self._size = selection, size
        device = selection.step.device
        self._rows = torch.zeros_like(selection.board.input_rows[:size], device=device)
        self._states = selection.attention.make_states(size, device)

    def begin(self) -> None:
        """Begin a step, before its layers."""
        selection = self._selection
        board = selection.board
        self._rows.copy_(board.input_rows[: self._size], non_blocking=True)
        board.levels.copy_(board.given_levels, non_blocking=True)
        board.budgets.copy_(board.given_budgets, non_blocking=True)
        board.needs.zero_()
        selection.kernels.begin(self._rows, selection.scratch)

    def plan(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's levels and budgets, which plans made on the device are to be written to."""
        board = self._selection.board
        return board.levels[layer, : self._size], board.budgets[layer, : self._size]

    def select(self, layer: int, query: Tensor) -> None:
        """Select in one layer, and list what is resident and what is missing.

        Args:
            layer: of the model.
            query: [rows, num_heads, head_dim] float32 on the device, contiguous, unscaled.
        """
        selection, board, size = self._selection, self._selection.board, self._size
        counts = board.counts[layer, :size]
        levels, budgets = self.plan(layer)
        host = HostLists(
            board.missing_units,
            board.missing_masks,
            board.missing_counts[layer],
            board.listed[layer],
        )
        selection.kernels.launch(
            layer,
            self._rows,
            query,
            levels,
            budgets,
            selection.tables,
            selection.scratch,
            selection.lists,
            counts,
            board.needs,
            host,
            selection.step,
            scores_hook=selection.scores_hook,
        )

    def attend_resident(self, layer: int, query: Tensor) -> None:
        """Attend to what is resident of what was selected.

        Args:
            layer: of the model.
            query: as for `select`.
        """
        selection, size = self._selection, self._size
        lists = selection.lists
        selection.attention.launch(
            query,
            selection.tier.kv,
            lists.resident_slots[:size],
            lists.resident_masks[:size],
            selection.board.counts[layer, :size],
            self._states,
        )

    def await_and_merge(
        self,
        layer: int,
        board: Board,
        window: WindowStates,
        stamps: Tensor,
        has_answer: Tensor,
        output: Tensor,
        memory: tuple[Tensor, Tensor, Tensor] | None,
        *,
        timeout_ns: int,
    ) -> None:
        """Wait for the host if it has to answer, and merge all parts of a layer.

        Args:
            layer: of the model.
            board: with the host's part.
            window: states of the windows.
            stamps: [2] int64 on the device: the clock before and after the wait.
            has_answer: [1] int32 on the device.
            output: [rows, num_heads, head_dim].
            memory: of the planner: its rows, the rows' slots, what it is told of the layer; None
                where plans are not made on the device.
            timeout_ns: how long to wait at most.
        """
        selection, size = self._selection, self._size
        told = None
        if memory is not None:
            plan_rows, slots, of_layer = memory
            told = ReadMemory(
                plan_rows, self._rows, slots, selection.lists.head_units[:size], of_layer
            )
        selection.handover.await_and_merge(
            window,
            self._states,
            HostStates(board.output, board.lse),
            selection.board.counts[layer, :size],
            board.answered[layer : layer + 1],
            board.skip[layer : layer + 1],
            selection.board.needs[layer : layer + 1],
            selection.step,
            board.error,
            stamps,
            has_answer,
            output,
            told,
            timeout_ns=timeout_ns,
            error_code=layer + 1,
        )

    def end(self) -> None:
        """End a step: what was selected goes to the host."""
        board = self._selection.board
        board.host_counts.copy_(board.counts, non_blocking=True)
