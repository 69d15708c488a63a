"""The import contract of pyproject.toml holds, and light modules stay light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_imports_follow_the_contract():
    lint_imports = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [lint_imports], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("fluxion_core.geometry", ("torch", "grpc", "numpy")),
        ("fluxion_core.errors", ("torch", "grpc", "numpy")),
        ("fluxion_core.client", ("torch", "numpy", "fluxion_core.kernels", "fluxion_core.decode")),
        ("services.cli.main", ("torch", "grpc", "transformers", "pydantic", "rich")),
        ("services.cli.waiting", ("torch", "grpc", "google.protobuf")),
    ],
)
def test_light_modules_import_nothing_heavy(module: str, heavy: tuple[str, ...]):
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["eval", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]):
    heavy = ("torch", "grpc", "numpy", "pydantic", "google.protobuf", "asyncio")
    code = (
        f"import sys; from services.cli.main import main; main({arguments!r}); "
        f"print([m for m in {heavy!r} if m in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stderr.strip() == "[]"
