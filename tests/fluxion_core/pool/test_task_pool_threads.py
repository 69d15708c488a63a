"""The pool's threads under ThreadSanitizer, without Python between them: task_pool_harness.cpp."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NATIVE = HERE.parents[2] / "fluxion_core" / "kernels" / "native"
SCENES = (
    "rounds do not touch each other",
    "workers that sleep are woken",
    "a thread that holds up rounds is left out",
    "one that was left out comes back",
    "a pool ends while a CPU is left out",
)


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The harness, built by the compiler that builds the extension."""
    program = tmp_path_factory.mktemp("pool") / "harness"
    pool = NATIVE / "pool"
    sources = (HERE / "task_pool_harness.cpp", pool / "task_pool.cpp", pool / "cpu_watch.cpp")
    subprocess.run(
        [
            *(os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-g", "-fsanitize=thread"),
            *("-pthread", "-I", NATIVE, *sources, "-o", program),
        ],
        check=True,
    )
    return program


@pytest.mark.alone
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="threads that meet need two CPUs")
@pytest.mark.parametrize("scene", SCENES)
def test_the_pool_alone(harness: Path, scene: str):
    done = subprocess.run(
        [harness, scene],
        env=os.environ | {"TSAN_OPTIONS": "halt_on_error=1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{scene}: ok\n"
