"""The fault matrix: `python -m tests.faults [NAME ...]`, `make faults`.

Prints a markdown table; 1 if a row did not come out. The quick rows are tests as well
(test_faults.py).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.faults import (
    client_faults,
    machine_faults,
    network_faults,
    node_faults,
    plane_faults,
)
from tests.faults.cluster import running_cluster
from tests.faults.matrix import Scenario, failed_line, skipped_line, table


def main() -> int:
    """Run what was named, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("names", nargs="*", help="scenarios whose names contain one of these")
    parser.add_argument("--logs", type=Path, help="an empty directory for logs and the model")
    arguments = parser.parse_args()

    def named(scenarios: Sequence[Scenario]) -> list[Scenario]:
        names = arguments.names
        return [each for each in scenarios if not names or any(n in each.__name__ for n in names)]

    lines: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.logs or Path(temporary)
        scenarios = named(
            (
                *node_faults.SCENARIOS,
                *client_faults.SCENARIOS,
                *machine_faults.SCENARIOS,
                *plane_faults.SHARED_MEMORY_SCENARIOS,
            )
        )
        clock = named(machine_faults.CLOCK_SCENARIOS)
        if clock and machine_faults.compiler() is None:
            lines += [skipped_line(each.__name__, "no C compiler") for each in clock]
            clock = []
        if scenarios or clock:
            with running_cluster(directory) as cluster:
                lines += [run(scenario, cluster) for scenario in (*scenarios, *clock)]
        plane = named(plane_faults.SCENARIOS)
        if plane:
            (directory / "sockets").mkdir()
            with plane_faults.running_socket_cluster(directory / "sockets") as cluster:
                lines += [run(scenario, cluster) for scenario in plane]
        network = named(network_faults.SCENARIOS)
        if network:
            lines += network_faults.run_in_namespaces([each.__name__ for each in network])
    print(table(lines))
    return 1 if any("| FAILED" in line for line in lines) else 0


def run(scenario: Scenario, cluster: object) -> str:
    """A line of the table."""
    began = time.monotonic()
    try:
        line = asyncio.run(scenario(cluster)).line()  # type: ignore[arg-type]
    except Exception as error:
        line = failed_line(scenario.__name__, error)
    print(f"{time.monotonic() - began:6.1f} s  {scenario.__name__}: {line}", file=sys.stderr)
    return line


if __name__ == "__main__":
    sys.exit(main())
