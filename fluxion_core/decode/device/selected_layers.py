"""Launches of a step's graph that selects for its rows, and reads what is resident."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fluxion_core.decode.device.board import Board
from fluxion_core.kernels.dense_attention.triton import WindowStates
from fluxion_core.kernels.tier.host_wait import HostWait
from fluxion_core.kernels.tier.merge import HostStates, ReadMemory
from fluxion_core.kernels.tier.selection import HostLists

if TYPE_CHECKING:
    from fluxion_core.decode.device.selection import DeviceSelection


class SelectedLayers:
    """Launches of a graph that selects for its rows.

    Args:
        selection: of the body.
        size: rows.
        is_short: all regions are short, see GroupSelection.is_short.
    """

    def __init__(self, selection: DeviceSelection, size: int, *, is_short: bool) -> None:
        self._selection, self._size, self._is_short = selection, size, is_short
        device = selection.step.device
        self._rows = torch.zeros_like(selection.board.input_rows[:size], device=device)
        self._states = selection.attention.make_states(size, device)
        self._arrivals, self._has_answer = torch.zeros(2, 1, dtype=torch.int32, device=device)

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
            query: [rows, num_heads, head_dim] on the device, unscaled; rows may lie apart.
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
            is_short=self._is_short,
            scores_hook=selection.scores_hook,
        )

    def attend_and_await(
        self, layer: int, query: Tensor, board: Board, stamps: Tensor, *, timeout_ns: int
    ) -> None:
        """Attend to what is resident of what was selected, and wait for the host if it has to
        answer.

        Args:
            layer: of the model.
            query: as for `select`.
            board: with the host's part.
            stamps: [2] int64 on the device: the clock before and after the wait.
            timeout_ns: how long to wait at most.
        """
        selection, size = self._selection, self._size
        lists = selection.lists
        wait = HostWait(
            self._arrivals,
            board.answered[layer : layer + 1],
            board.skip[layer : layer + 1],
            selection.board.needs[layer : layer + 1],
            selection.step,
            board.error,
            stamps,
            self._has_answer,
            timeout_ns,
            error_code=layer + 1,
        )
        selection.attention.launch(
            query,
            selection.tier.kv,
            lists.resident_slots[:size],
            lists.resident_masks[:size],
            selection.board.counts[layer, :size],
            self._states,
            wait,
        )

    def merge(
        self,
        layer: int,
        board: Board,
        window: WindowStates,
        output: Tensor,
        memory: tuple[Tensor, Tensor, Tensor] | None,
    ) -> None:
        """Merge all parts of a layer.

        Args:
            layer: of the model.
            board: with the host's part.
            window: states of the windows.
            output: [rows, num_heads, head_dim].
            memory: of the planner: its rows, the rows' slots, what it is told of the layer; None
                where plans are not made on the device.
        """
        selection, size = self._selection, self._size
        told = None
        if memory is not None:
            plan_rows, slots, of_layer = memory
            told = ReadMemory(
                plan_rows, self._rows, slots, selection.lists.head_units[:size], of_layer
            )
        selection.merge.merge(
            window,
            self._states,
            HostStates(board.output, board.lse),
            selection.board.counts[layer, :size],
            self._has_answer,
            output,
            told,
        )

    def end(self) -> None:
        """End a step: what was selected goes to the host."""
        board = self._selection.board
        board.host_counts.copy_(board.counts, non_blocking=True)
