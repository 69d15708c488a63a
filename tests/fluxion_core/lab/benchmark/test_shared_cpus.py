"""What the bench of shared CPUs is asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fluxion_core.errors import ConfigError
from fluxion_core.lab.benchmark.shared_cpus import Variant, _affinity, options_from


def test_options_are_words_with_values():
    options, path = options_from(
        ["contexts=8192,4096", "busy=", "layers=2", "policies=exact; fixed(16, 5 %)", "json=a.json"]
    )
    assert (options.contexts, options.busy, options.layers) == ((8192, 4096), (), 2)
    assert options.policies == ("exact", "fixed(16, 5 %)")
    assert path == Path("a.json")
    with pytest.raises(ConfigError, match="'cores=3'"):
        options_from(["cores=3"])


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_a_pool_that_never_had_a_cpu_starts_without_it_and_gives_it_back():
    before = os.sched_getaffinity(0)
    busy = max(before)
    with _affinity(Variant("busy: CPUs not used", None, (busy,), keeps_off=True)):
        assert os.sched_getaffinity(0) == before - {busy}
    assert os.sched_getaffinity(0) == before
