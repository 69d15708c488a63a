"""Head output errors of quality levels while they serve, true ones beside predicted ones.

Steps measure few groups of heads (fluxion_core/decode/head_errors.py). Here samples are kept by
level, the last WINDOW_SAMPLES of each, and a level is said to miss its aim where the mean of what
its groups lost, squared, is above FACTOR times what its plans were made with, by more than
DEVIATIONS standard errors of the mean. Few steps do most of the damage, so that squares have a long
tail; a lower bound made from such samples lies too low rather than too high: it warns late.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np

from fluxion_core.decode.step import HeadErrorSample
from fluxion_core.observe.log import event
from fluxion_core.planning.policy import Policy

_log = logging.getLogger(__name__)

WINDOW_SAMPLES = 1000
"""Of each level, the last ones, that its figures are of."""

FACTOR = 2.0
"""Mean squared error over the predicted one, above which a level misses its aim."""

DEVIATIONS = 3.0
"""Standard errors that it must be above by: by chance in 1 of 700 looks, were they normal."""

LEAST_SAMPLES = 200
"""Nothing is said of a level before."""

JUDGED_SAMPLES = 50
"""New samples of a level, after which it is judged for the log."""

WARN_SECONDS = 600.0
"""Between two warnings about one level."""


@dataclass(frozen=True)
class LevelErrors:
    """Figures of one level."""

    true: float
    """Root mean square of head output errors over the window."""
    predicted: float | None
    """The same of what plans were made with; None for policies that predict nothing."""
    misses_aim: bool
    samples: int
    """Since start."""
    read_bytes: int
    """K and V read for them since start."""


@dataclass
class _Window:
    recent: deque[HeadErrorSample] = field(default_factory=lambda: deque(maxlen=WINDOW_SAMPLES))
    samples: int = 0
    read_bytes: int = 0
    judged_at: int = 0
    """Samples then."""
    warned_at: float = -math.inf


class HeadErrors:
    """Samples of a node by level. The engine's thread adds; `figures` may be read from any.

    Args:
        levels: policies by the names of quality levels. What requests ask for beside them counts
            under the policy's kind, so that there are few names.
        clock: seconds.
    """

    def __init__(
        self, levels: Mapping[str, Policy], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._names = {policy: name for name, policy in reversed([*levels.items()])}
        self._clock = clock
        self._windows: dict[str, _Window] = {}

    def add(self, policy: Policy, samples: Sequence[HeadErrorSample]) -> None:
        """Count samples of one step; now and then says in the log if the level misses its aim."""
        level = self._names.get(policy, policy.kind)
        window = self._windows.get(level) or _Window()
        window.recent.extend(samples)
        window.samples += len(samples)
        window.read_bytes += sum(sample.read_bytes for sample in samples)
        # Only now: a level that can be found has samples.
        self._windows[level] = window
        if window.samples - window.judged_at >= JUDGED_SAMPLES:
            window.judged_at = window.samples
            self._judge(level, window)

    def figures(self) -> dict[str, LevelErrors]:
        """Figures by level, of levels that have samples. From any thread; takes no lock."""
        return {level: _figures(window) for level, window in list(self._windows.items())}

    def _judge(self, level: str, window: _Window) -> None:
        now = self._clock()
        if now - window.warned_at < WARN_SECONDS:
            return
        figures = _figures(window)
        if not figures.misses_aim:
            return
        window.warned_at = now
        _log.warning(
            event(
                "a quality level misses its aim",
                level=level,
                head_error=figures.true,
                predicted=figures.predicted,
                samples=len(window.recent),
                remedy="ask for a higher level, or train weights for the model",
            )
        )


def misses_aim(true: Sequence[float], predicted: Sequence[float]) -> bool:
    """Whether mean squared errors are above FACTOR times the predicted ones beyond chance.

    Args:
        true: squares, by sample; samples are taken as independent of each other.
        predicted: those of the same samples.
    """
    if len(true) < LEAST_SAMPLES:
        return False
    excess = np.asarray(true) - FACTOR * np.asarray(predicted)
    return bool(excess.mean() > DEVIATIONS * excess.std(ddof=1) / math.sqrt(len(excess)))


def _figures(window: _Window) -> LevelErrors:
    # A copy, which nobody adds to.
    recent = list(window.recent)
    true = [sample.squared_error for sample in recent]
    # One kind of policy, and one way of making plans: all of a level predict, or none.
    predicted = [one.predicted for one in recent if one.predicted is not None]
    return LevelErrors(
        math.sqrt(fmean(true)),
        math.sqrt(fmean(predicted)) if predicted else None,
        bool(predicted) and misses_aim(true, predicted),
        window.samples,
        window.read_bytes,
    )
