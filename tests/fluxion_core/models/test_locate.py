"""Finding a model by path or name; what is not there is said with the way to get it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluxion_core.errors import ConfigError, ModelNotFoundError
from fluxion_core.models.locate import default_models_dir, locate_model


@pytest.fixture
def models_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    directory = tmp_path / "models"
    (directory / "small").mkdir(parents=True)
    (directory / "small" / "small.gguf").touch()
    (directory / "Org" / "Name").mkdir(parents=True)
    (directory / "Org" / "Name" / "config.json").touch()
    return directory


def test_a_name_that_no_message_can_carry_is_refused(tmp_path):
    (tmp_path / "caf\udce9.gguf").touch()
    for name in (str(tmp_path), str(tmp_path / "caf\udce9.gguf"), "caf\udce9"):
        with pytest.raises(ConfigError, match="is not UTF-8 text; rename"):
            locate_model(name, tmp_path)


def test_a_name_is_its_only_gguf_file(models_dir):
    assert locate_model("small", models_dir) == models_dir / "small" / "small.gguf"


def test_a_hub_name_is_its_directory(models_dir):
    assert locate_model("Org/Name", models_dir) == models_dir / "Org" / "Name"


def test_paths_of_files_and_directories_are_taken(models_dir, tmp_path):
    file = models_dir / "small" / "small.gguf"
    assert locate_model(str(file), tmp_path / "absent") == file
    assert locate_model(str(file.parent), tmp_path / "absent") == file
    hub = models_dir / "Org" / "Name"
    assert locate_model(str(hub), tmp_path / "absent") == hub


def test_a_directory_here_without_a_model_does_not_hide_a_pulled_one(models_dir):
    Path("small").mkdir()
    assert locate_model("small", models_dir).parent == models_dir / "small"


def test_an_unknown_name_says_how_to_pull_it(models_dir):
    with pytest.raises(ModelNotFoundError, match="run `fluxion pull smollm2-135m`"):
        locate_model("smollm2-135m", models_dir)


@pytest.mark.parametrize("path", ["/absent/model.gguf", "../small", "absent.gguf"])
def test_an_absent_path_is_not_offered_for_pulling(models_dir, path):
    with pytest.raises(ModelNotFoundError, match="does not exist") as caught:
        locate_model(path, models_dir)
    assert "pull" not in str(caught.value)


def test_a_directory_without_a_model_is_refused(models_dir, tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"neither config\.json nor a \.gguf file"):
        locate_model(str(tmp_path / "empty"), models_dir)


def test_several_gguf_files_are_ambiguous(models_dir):
    (models_dir / "small" / "other.gguf").touch()
    with pytest.raises(ModelNotFoundError, match=r"several GGUF files \(other\.gguf, small\.gguf"):
        locate_model("small", models_dir)


def test_an_empty_name_is_refused(models_dir):
    with pytest.raises(ModelNotFoundError, match="empty"):
        locate_model("", models_dir)


def test_models_lie_in_the_users_data_directory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_models_dir() == Path("/data/fluxion/models")
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_models_dir() == Path("/home/someone/.local/share/fluxion/models")


@pytest.mark.parametrize("with_weights", [True, False])
def test_a_config_beside_a_gguf_file_is_of_the_weights_that_are_there(tmp_path, with_weights):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    if with_weights:
        (tmp_path / "model.safetensors").write_bytes(b"")
    expected = tmp_path if with_weights else tmp_path / "model.gguf"
    assert locate_model(str(tmp_path), tmp_path) == expected
