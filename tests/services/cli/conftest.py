"""A fake node, in this process or as a child, for the tests of the command."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from services.cli.addresses import choose_listen_address
from services.cli.node_plans import NodePlan

_FAKE_NODE_PATH = Path(__file__).with_name("fake_node.py")


@pytest.fixture(scope="session")
def fake_node() -> ModuleType:
    """The module fake_node.py beside this file."""
    spec = importlib.util.spec_from_file_location("fluxion_fake_node", _FAKE_NODE_PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def decode_node(fake_node: ModuleType) -> Iterator[SimpleNamespace]:
    """A fake decode node on loopback: its `address`, and `generation` to script and inspect."""
    generation = fake_node.FakeGeneration()
    statuses = {"": fake_node.SERVING, "fluxion.v1.Generation": fake_node.SERVING}
    server, port = fake_node.serve(generation, statuses, "127.0.0.1:0")
    yield SimpleNamespace(address=f"127.0.0.1:{port}", generation=generation)
    server.stop(None).wait()


@pytest.fixture
def plan_fake_node() -> Callable[..., NodePlan]:
    """Makes the plan of a child process that runs the fake node."""

    def plan(name: str, service: str, *flags: str) -> NodePlan:
        address = str(choose_listen_address("127.0.0.1:0", preferred="", flag="--listen"))
        command = (sys.executable, str(_FAKE_NODE_PATH), "--listen", address)
        return NodePlan(name, (*command, "--service", service, *flags), address, service)

    return plan
