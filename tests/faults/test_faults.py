"""The quick rows of the fault matrix (`make faults` has them all), and that deadlines need no wall
clock."""

from __future__ import annotations

import ast
import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT
from tests.faults import client_faults, node_faults, plane_faults
from tests.faults.cluster import Cluster, running_cluster
from tests.faults.matrix import Scenario

QUICK = (
    *node_faults.QUICK_SCENARIOS,
    *client_faults.SCENARIOS,
    *plane_faults.SHARED_MEMORY_SCENARIOS,
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("faults")) as nodes:
        yield nodes


@pytest.mark.parametrize("scenario", QUICK, ids=lambda scenario: scenario.__name__)
def test_a_fault_ends_as_documented_and_leaves_nothing_behind(cluster, scenario: Scenario):
    # What the scenario asserts; how long it takes is printed by `make faults`.
    asyncio.run(scenario(cluster))


@pytest.fixture(scope="module")
def socket_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with plane_faults.running_socket_cluster(tmp_path_factory.mktemp("sockets")) as nodes:
        yield nodes


@pytest.mark.parametrize(
    "scenario", plane_faults.QUICK_SCENARIOS, ids=lambda scenario: scenario.__name__
)
def test_a_fault_of_the_data_plane_ends_as_documented_too(socket_cluster, scenario: Scenario):
    asyncio.run(scenario(socket_cluster))


WALL_CLOCK_CALLS = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("date", "today")}

MAY_LOOK_AT_THE_WALL_CLOCK = {
    "services/decode/vllm_api.py": "a timestamp in an answer",
    "fluxion_core/generation/chat.py": "the date, for chat templates",
    "fluxion_core/lab/training/collect.py": "an instant that other processes understand; offline",
    "services/cli/loopback_certificate.py": "from when a certificate is good",
    "fluxion_core/wire/tls.py": "whether certificates have expired",
}


def wall_clock_calls(path: Path) -> list[str]:
    """Calls and references like time.time, datetime.now, in a module."""
    return [
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) in WALL_CLOCK_CALLS
    ]


def test_nothing_but_what_shows_dates_looks_at_the_wall_clock():
    looking = {
        str(path.relative_to(ROOT))
        for package in ("services", "fluxion_core")
        for path in (ROOT / package).rglob("*.py")
        if wall_clock_calls(path)
    }
    assert looking == set(MAY_LOOK_AT_THE_WALL_CLOCK)
