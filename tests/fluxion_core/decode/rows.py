"""Rows of decode steps in tests that have no step: neither slots nor tokens matter there."""

from __future__ import annotations

from collections.abc import Sequence

from fluxion_core.decode.step import StepRow
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.planning.planner import PlannerState
from fluxion_core.planning.policy import Policy


def rows_of(
    sequences: Sequence[SequenceKv],
    policies: Sequence[Policy],
    states: Sequence[PlannerState | None] | None = None,
) -> list[StepRow]:
    """One row for each sequence."""
    return [
        StepRow(sequence, slot=index, token_id=0, policy=policy, state=state)
        for index, (sequence, policy, state) in enumerate(
            zip(sequences, policies, states or [None] * len(sequences), strict=True)
        )
    ]
