"""Options of training, whoever asks for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from fluxion_core.config.commands import flag, within

DEFAULT_LEVELS = (
    ("ACCURATE", "marginal(0.1)"),
    ("BALANCED", "marginal(0.3)"),
    ("FAST", "marginal(1)"),
)
"""What quality levels mean until `fluxion eval` says better."""


@dataclass(frozen=True, kw_only=True)
class TrainRun:
    """A run as a user asks for it: its texts, its length, and what is measured."""

    output: Path = field(kw_only=False)
    """Takes samples, weights, report, card and plots."""
    documents: Path = Path("documents")
    """Long documents; gathered from packages if there are none."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where texts are computed; auto takes a GPU if there is one."""
    workers: Annotated[int, within(1)] = 1
    """Processes that collect and replay; 6 use a GPU well."""
    collect_seconds: Annotated[float, within(1)] = 3600.0
    """No training text is begun after this time, s; what is there is trained on."""
    epochs: Annotated[float, within(0.1)] = 30.0
    """Passes over the samples."""
    curve_documents: Annotated[int, within(1)] = 16
    """Unseen texts that KL over bytes is measured on."""
    ablation: Annotated[bool, flag()] = False
    """Train without each group of features as well, a fifth of the epochs each."""
