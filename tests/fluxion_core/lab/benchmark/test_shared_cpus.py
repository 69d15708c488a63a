"""What the bench of shared CPUs is asked for."""

from __future__ import annotations

import os

import pytest

from fluxion_core.config.commands import run_module
from fluxion_core.lab.benchmark import shared_cpus
from fluxion_core.lab.benchmark.shared_cpus import (
    SharedCpusCommand,
    SharedCpusOptions,
    Variant,
    _affinity,
)


def test_flags_become_options(monkeypatch: pytest.MonkeyPatch):
    asked: list[SharedCpusOptions] = []
    monkeypatch.setattr(
        shared_cpus, "run_shared_cpus_bench", lambda _, options: asked.append(options)
    )
    flags = ["--contexts", "8192,4096", "--busy", "", "--layers", "2"]
    flags += ["--policies", "exact, fixed(16, 5 %)"]
    assert run_module(SharedCpusCommand, flags) == 0
    (options,) = asked
    assert (options.contexts, options.busy, options.layers) == ((8192, 4096), (), 2)
    assert options.policies == ("exact", "fixed(16, 5 %)")
    assert run_module(SharedCpusCommand, ["--cores", "3"]) == 2


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_a_pool_that_never_had_a_cpu_starts_without_it_and_gives_it_back():
    before = os.sched_getaffinity(0)
    busy = max(before)
    with _affinity(Variant("busy: CPUs not used", None, (busy,), keeps_off=True)):
        assert os.sched_getaffinity(0) == before - {busy}
    assert os.sched_getaffinity(0) == before
