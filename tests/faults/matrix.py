"""A row of the fault matrix, and the table of all."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from tests.faults.cluster import Cluster

HEAD = (
    "| what fails | the client sees | after, s | documented limit | left reserved | serves after |",
    "|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Row:
    """What came of one fault. Whoever makes it has asserted all but the seconds."""

    fault: str
    client_sees: str
    seconds: float
    """From the fault to the end of what the client waits for."""
    limit: str
    """The documented one."""
    serves: str = "yes, right tokens"

    def line(self) -> str:
        """Of the table; whoever made the row has found nothing reserved."""
        cells = (self.fault, self.client_sees, f"{self.seconds:.2f}", self.limit, "0", self.serves)
        return f"| {' | '.join(cells)} |"


Scenario = Callable[[Cluster], Awaitable[Row]]


def failed_line(name: str, error: BaseException) -> str:
    """A scenario that did not come out."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return f"| {name} | FAILED: {reason} | | | | |"


def skipped_line(name: str, reason: str) -> str:
    """A scenario that cannot be had here."""
    return f"| {name} | not run here: {reason} | | | | |"


def table(lines: Sequence[str]) -> str:
    """The matrix as markdown, with the machine it was run on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    machine = (
        f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}, Python "
        f"{platform.python_version()}, commit {commit or 'unknown'}"
    )
    return "\n".join([f"`make faults` on {machine}.", "", *HEAD, *lines])
