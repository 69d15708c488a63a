"""Fixtures that many tests share."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
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

torch.set_num_threads(min(2, os.cpu_count() or 1))


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
    pull_model("smollm2-135m", models_dir, Console(stderr=True))
    return locate_model("smollm2-135m", models_dir)
