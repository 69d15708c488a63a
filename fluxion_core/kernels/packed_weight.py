"""Weights as the native products read them: panels of 16 outputs, `[panels][inputs][16]`.

What a product does with them: native/operations/dense_rows.inl.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fluxion_core.geometry import ceil_div

PANEL_COLUMNS = 16


def padded(outputs: int) -> int:
    """Outputs with those that fill the last panel."""
    return ceil_div(outputs, PANEL_COLUMNS) * PANEL_COLUMNS


def pack(weight: Tensor, panels: Tensor) -> None:
    """Lay a matrix out in panels; zeros fill the last one.

    Args:
        weight: [outputs, inputs], any floating dtype.
        panels: [panels, inputs, 16] float32 or bfloat16, where it is written to; each panel is
            contiguous.
    """
    outputs, inputs = weight.shape
    whole, rest = divmod(outputs, PANEL_COLUMNS)
    in_panels = weight[: outputs - rest].view(whole, PANEL_COLUMNS, inputs)
    panels[:whole].copy_(in_panels.transpose(1, 2))
    if rest:
        panels[whole, :, :rest].copy_(weight[outputs - rest :].t())
        panels[whole, :, rest:].zero_()


def packed_rows(panels: Tensor, outputs: Tensor) -> Tensor:
    """Rows of the matrix that was packed: [rows, inputs] for [rows] int64 numbers of outputs."""
    return panels[outputs // PANEL_COLUMNS, :, outputs % PANEL_COLUMNS]


def padded_vector(vector: Tensor) -> Tensor:
    """[outputs] in any floating dtype as float32, filled with zeros to whole panels."""
    wide = torch.zeros(padded(vector.shape[0]))
    wide[: vector.shape[0]] = vector
    return wide
