"""Policies: what a decode step reads of the retrieval region.

`exact` reads all of it. `fixed(block size, budget)` reads, for every query head, the best blocks of
one size up to a share of the region: the paper's baselines. `threshold(error)` and
`marginal(price)` decide anew at every step, per group and head, from predicted head profiles.

In a step a policy becomes a source of plans for each of its rows: per layer and KV head the digest
level to choose by (one of the levels below 0 means no choice), per query head how many blocks of
that level.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fluxion_core.errors import ConfigError
from fluxion_core.geometry import BLOCK_SIZES, ceil_div
from fluxion_core.kernels import _native
from fluxion_core.observe.device_usage import PolicyKind
from fluxion_core.planning.constants import READ_ALL


@dataclass(frozen=True)
class PlanInputs:
    """Facts of a row that its policy may use when a step begins."""

    region: range
    """The retrieval region, in tokens; not empty."""
    num_kv_heads: int
    """Of the model."""
    num_heads: int
    """Query heads of the model."""
    predicted: Callable[[PredictedPolicy], _native.PlanSource]
    """The body's own source of plans from head profiles, for this row."""


class Policy(ABC):
    """Rule by which steps read a region; one for many sequences, immutable."""

    @property
    @abstractmethod
    def kind(self) -> PolicyKind:
        """Name of the policy without its numbers."""

    @property
    def needs_profile(self) -> bool:
        """Whether its sequences need head profiles."""
        return False

    @property
    def reads_everything(self) -> bool:
        """Whether every head attends to all tokens."""
        return False

    @abstractmethod
    def plans(self, inputs: PlanInputs) -> _native.PlanSource:
        """Source of one row's plans in one step."""


@dataclass(frozen=True)
class ExactPolicy(Policy):
    """Every head attends to all tokens."""

    @property
    def kind(self) -> PolicyKind:
        """Name of the policy without its numbers."""
        return "exact"

    @property
    def reads_everything(self) -> bool:
        """Whether every head attends to all tokens."""
        return True

    def plans(self, inputs: PlanInputs) -> _native.PlanSource:
        """Source of one row's plans in one step."""
        return _uniform(inputs, READ_ALL, 0)

    def __str__(self) -> str:
        return "exact"


@dataclass(frozen=True)
class FixedPolicy(Policy):
    """Every head attends to the same share of the region, in blocks of one size.

    Source: the baselines of arXiv:2605.07719.
    """

    block_size: int
    """Tokens of a block: one of BLOCK_SIZES."""
    budget: float
    """Share of the region's blocks, above 0 and up to 1; rounded up to whole blocks."""

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise ConfigError(f"block size {self.block_size}; one of {BLOCK_SIZES}")
        if not 0 < self.budget <= 1:
            raise ConfigError(
                f"budget {self.budget:g} of the region; above 0 and at most 1 (100 %)"
            )

    @property
    def kind(self) -> PolicyKind:
        """Name of the policy without its numbers."""
        return "fixed"

    @property
    def level(self) -> int:
        """Index of the block size in BLOCK_SIZES."""
        return BLOCK_SIZES.index(self.block_size)

    def num_blocks(self, region: range) -> int:
        """Blocks that one head reads of a region of these tokens."""
        total = ceil_div(region.stop, self.block_size) - region.start // self.block_size
        # Without the margin, 5 % of 100 blocks would be 6: 0.05 is a little above a twentieth.
        return math.ceil(self.budget * total * (1 - 1e-9)) if region else 0

    def plans(self, inputs: PlanInputs) -> _native.PlanSource:
        """Source of one row's plans in one step."""
        return _uniform(inputs, self.level, self.num_blocks(inputs.region))

    def __str__(self) -> str:
        return f"fixed({self.block_size}, {self.budget * 100:g} %)"


class PredictedPolicy(Policy):
    """Base of policies that decide from head profiles."""

    @property
    def needs_profile(self) -> bool:
        """Whether its sequences need head profiles."""
        return True

    def plans(self, inputs: PlanInputs) -> _native.PlanSource:
        """Source of one row's plans in one step."""
        return inputs.predicted(self)


@dataclass(frozen=True)
class ThresholdPolicy(PredictedPolicy):
    """The cheapest plan that keeps every head's predicted error within a threshold.

    Source: the policy of arXiv:2605.07719.
    """

    error: float
    """Head output error, above 0."""

    def __post_init__(self) -> None:
        _check_positive("threshold", self.error)

    @property
    def kind(self) -> PolicyKind:
        """Name of the policy without its numbers."""
        return "threshold"

    def __str__(self) -> str:
        return f"threshold({self.error:g})"


@dataclass(frozen=True)
class MarginalPolicy(PredictedPolicy):
    """The plan with the least sum of weighted squared errors plus price times bytes."""

    price: float
    """Weighted squared error that reading the whole region of a group may save, above 0."""

    def __post_init__(self) -> None:
        _check_positive("marginal", self.price)

    @property
    def kind(self) -> PolicyKind:
        """Name of the policy without its numbers."""
        return "marginal"

    def __str__(self) -> str:
        return f"marginal({self.price:g})"


_FIXED = re.compile(r"fixed\(\s*(\d+)\s*,\s*([0-9.]+)\s*(%?)\s*\)")
_PREDICTED = re.compile(r"(threshold|marginal)\(\s*([0-9.eE+-]+)\s*\)")


def _check_positive(name: str, number: float) -> None:
    if not (number > 0 and math.isfinite(number)):
        raise ConfigError(f"{name}({number:g}); its number must be above 0 and finite")


def parse_policy(text: str) -> Policy:
    """A policy from its name: `exact`, `fixed(16, 5 %)`, `threshold(0.1)` or `marginal(0.001)`.

    Raises:
        ConfigError: it is none, or its numbers are out of range.
    """
    if text.strip() == "exact":
        return ExactPolicy()
    if match := _FIXED.fullmatch(text.strip()):
        block_size, number, percent = match.groups()
        try:
            budget = float(number) / (100 if percent else 1)
        except ValueError:
            raise ConfigError(f"policy {text!r}: {number!r} is no number") from None
        return FixedPolicy(int(block_size), budget)
    if match := _PREDICTED.fullmatch(text.strip()):
        try:
            value = float(match[2])
        except ValueError:
            raise ConfigError(f"policy {text!r}: {match[2]!r} is no number") from None
        return ThresholdPolicy(value) if match[1] == "threshold" else MarginalPolicy(value)
    raise ConfigError(
        f"policy {text!r}; one of: exact, fixed(BLOCK_SIZE, BUDGET %), threshold(ERROR), "
        f"marginal(PRICE)"
    )


def _uniform(inputs: PlanInputs, level: int, num_blocks: int) -> _native.PlanSource:
    """The same for all heads and layers."""
    levels = np.full((1, inputs.num_kv_heads), level, np.int32)
    return _native.GivenPlans(levels, np.full((1, inputs.num_heads), num_blocks, np.int32))
