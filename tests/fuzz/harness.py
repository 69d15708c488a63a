"""Cases by seed and number, and what must hold for each of them.

A case is made from `Random(target/seed/number)` alone: any one can be run again, and a run can go
on where another one stopped. A target refuses its input with a FluxionError or accepts it; any
other exception, a broken promise, a crash, a hang or more memory than the input warrants is a
finding.
"""

from __future__ import annotations

import time
import traceback
import tracemalloc
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

MEASURED_EVERY = 64
"""Every so many cases Python's memory is traced, which is slow."""

SPARE_BYTES = 2 << 20
"""What a case may need whatever its input."""

BYTES_PER_INPUT_BYTE = 64
"""What a byte of input may need: a JSON number of one digit is an object of 32."""


class ViolationError(AssertionError):
    """A promise does not hold."""


@dataclass(frozen=True)
class Outcome:
    """How a case ended."""

    result: str
    """accepted, or the name of the error that refused it."""
    units: int
    """Frames, headers or requests that the code under test took."""
    input_bytes: int


class Target(Protocol):
    """Code under test and a maker of inputs for it."""

    name: str
    unit: str
    """What is counted."""

    def run(self, random: Random) -> Outcome:
        """Make one input, feed it, check what must hold.

        Raises:
            ViolationError: it does not hold.
            Exception: any that is not a FluxionError, as the code under test raised it.
        """
        ...

    def close(self) -> None:
        """Give back what the target holds."""
        ...


@dataclass
class Tally:
    """What a run of cases came to."""

    cases: int = 0
    units: int = 0
    input_bytes: int = 0
    results: dict[str, int] = field(default_factory=dict)
    """Cases by how they ended."""
    slowest_seconds: float = 0.0
    slowest_case: int = 0
    peak_bytes: int = 0
    """Most Python memory that a traced case took."""

    def add(self, other: Tally) -> None:
        """Count another run's cases too."""
        self.cases += other.cases
        self.units += other.units
        self.input_bytes += other.input_bytes
        for result, count in other.results.items():
            self.count(result, count)
        if other.slowest_seconds > self.slowest_seconds:
            self.slowest_seconds, self.slowest_case = other.slowest_seconds, other.slowest_case
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)

    def count(self, result: str, cases: int = 1) -> None:
        """Count cases that ended so."""
        self.results[result] = self.results.get(result, 0) + cases


@dataclass(frozen=True)
class Finding:
    """A case that must not end as it did."""

    target: str
    seed: int
    case: int
    what: str


def run_case(target: Target, seed: int, case: int, tally: Tally) -> Finding | None:
    """Run one case and count it; what it found, if it found something."""
    random = Random(f"{target.name}/{seed}/{case}")
    is_measured = case % MEASURED_EVERY == 0
    if is_measured:
        tracemalloc.start()
    started = time.perf_counter()
    try:
        outcome = target.run(random)
        seconds = time.perf_counter() - started
        if is_measured:
            _check_memory(outcome, tally)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        # Panics of native libraries are no Exceptions.
        return Finding(target.name, seed, case, traceback.format_exc(limit=-6))
    finally:
        if is_measured:
            tracemalloc.stop()
    tally.cases += 1
    tally.units += outcome.units
    tally.input_bytes += outcome.input_bytes
    tally.count(outcome.result)
    if seconds > tally.slowest_seconds:
        tally.slowest_seconds, tally.slowest_case = seconds, case
    return None


def _check_memory(outcome: Outcome, tally: Tally) -> None:
    peak = tracemalloc.get_traced_memory()[1]
    tally.peak_bytes = max(tally.peak_bytes, peak)
    allowed = SPARE_BYTES + BYTES_PER_INPUT_BYTE * outcome.input_bytes
    if peak > allowed:
        raise ViolationError(f"{peak} B of memory for an input of {outcome.input_bytes} B")
