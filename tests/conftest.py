"""Fixtures that many tests share."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadScopeScheduling

if is_one_of_several := "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is loaded, here and in the nodes that tests start: threads that wait do not spin.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

if native := os.environ.get("FLUXION_NATIVE"):
    # Another build of the native module, say one with a sanitizer, in place of the installed one.
    name = "fluxion_core.kernels._native"
    spec = importlib.util.spec_from_file_location(name, native)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter. It looks when a kernel's module is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1 if is_one_of_several else min(2, os.cpu_count() or 1))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Who runs what, where several processes run the tests (`-n 2`).

    The tests of a file stay together, for what its fixtures hold, and so do all of tests/e2e, which
    share nodes and take longest: files are begun in their order, in which those come early.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "tests/e2e" if path.startswith("tests/e2e/") else path

    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test marked `alone` waits for those of other processes, and they for it."""
    if not is_one_of_several:
        return (yield)
    gate, turn = (os.open(path, os.O_RDONLY) for path in (Path(__file__), Path(__file__).parent))
    mode = fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH
    try:
        # Who waits to be alone holds the gate, so that others do not begin before it.
        fcntl.flock(gate, mode)
        fcntl.flock(turn, mode)
        fcntl.flock(gate, fcntl.LOCK_UN)
        return (yield)
    finally:
        os.close(turn)
        os.close(gate)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The embedded model's GGUF file, pulled once if it is not there yet.

    FLUXION_TEST_MODEL names a file to use instead.
    """
    given = os.environ.get("FLUXION_TEST_MODEL")
    if given:
        return Path(given)
    from rich.console import Console

    from fluxion_core.models.locate import default_models_dir, locate_model
    from services.cli.pull import pull_model

    models_dir = default_models_dir()
    # Of several processes with tests, one pulls.
    pull_model("smollm2-135m", models_dir, Console(stderr=True))
    return locate_model("smollm2-135m", models_dir)
