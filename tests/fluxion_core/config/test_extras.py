"""The base install does without the packages of extras, and says which extra brings each."""

from __future__ import annotations

import ast
import io
import logging
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from rich.console import Console

from fluxion_core.config.extras import MissingExtraError
from fluxion_core.lab.plots.pictures import new_figure
from fluxion_core.observe.nvml import open_nvml
from services.cli.pull import pull_model

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {"matplotlib": "plots", "huggingface_hub": "hub", "pynvml": "cuda"}
"""What extras bring, as it is imported, and which extra that is."""


def test_a_picture_names_the_extra_that_draws_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError) as failure:
        new_figure(1, 1)
    assert str(failure.value) == (
        "a picture needs matplotlib: pip install 'fluxion-inference[plots]'"
    )


def test_a_model_of_the_hub_names_the_extra_that_fetches_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError) as failure:
        pull_model("Org/Name", tmp_path, Console(file=io.StringIO()))
    assert str(failure.value) == (
        "fetching Org/Name needs huggingface-hub: pip install 'fluxion-inference[hub]'"
    )
    assert not list(tmp_path.iterdir())


def test_a_node_without_nvml_serves_on_and_its_log_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with caplog.at_level(logging.WARNING):
        assert open_nvml("GPU-1") is None
    assert "needs nvidia-ml-py: pip install 'fluxion-inference[cuda]'" in caplog.text


def test_every_extra_that_is_named_is_one():
    assert set(MODULES.values()) <= PROJECT["optional-dependencies"].keys()
    base = " ".join(PROJECT["dependencies"])
    assert not any(name in base for name in ("matplotlib", "huggingface", "nvidia-ml"))


def test_commands_and_nodes_do_without_the_packages_of_extras():
    # Blocked in a fresh process, before anything of ours is imported.
    code = f"""
import sys
for name in {list(MODULES)!r}:
    sys.modules[name] = None
import services.decode.__main__, services.prefill.__main__, fluxion_core.client
import services.cli.pull, services.cli.up, services.cli.demo, services.cli.trace
import services.cli.eval_command, services.cli.train_command, services.cli.serve_bench
import fluxion_core.lab.benchmark.kernels, fluxion_core.generation.tokenizer
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize("module", MODULES)
def test_one_place_imports_each(module: str):
    places = {
        path.relative_to(ROOT).parent
        for package in ("fluxion_core", "services")
        for path in (ROOT / package).rglob("*.py")
        if module in path.read_text() and imports(path, module)
    }
    assert len(places) == 1


def imports(path: Path, module: str) -> bool:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return any(name.partition(".")[0] == module for name in names)
