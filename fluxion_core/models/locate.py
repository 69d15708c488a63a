"""Finding a model's files: by path, or by the name under which `fluxion pull` put them."""

from __future__ import annotations

import os
from pathlib import Path

from fluxion_core.errors import ConfigError, ModelNotFoundError


def default_models_dir() -> Path:
    """The user's data directory: $XDG_DATA_HOME/fluxion/models, or ~/.local/share/…

    Raises:
        ConfigError: this user has no home directory, as in a container that runs as any user.
    """
    data_home = os.environ.get("XDG_DATA_HOME") or _home("~") / ".local" / "share"
    return Path(data_home) / "fluxion" / "models"


def locate_model(name_or_path: str, models_dir: Path) -> Path:
    """A GGUF file or a safetensors directory.

    Args:
        name_or_path: an existing file or directory, or the name of a model that was pulled.
        models_dir: where pulled models are.

    Raises:
        ModelNotFoundError: nothing is there; the text says how to get it.
        ConfigError: it begins with ~, and there is no home directory; or it is not UTF-8 text.
    """
    if not name_or_path:
        raise ModelNotFoundError("model name is empty; give a path or a name for `fluxion pull`")
    _check_name(name_or_path)
    path = _home(name_or_path) if name_or_path.startswith("~") else Path(name_or_path)
    found = _model_at(path)
    if found is not None:
        return found
    if path.is_absolute() or ".." in path.parts or path.suffix == ".gguf":
        what = "holds neither config.json nor a .gguf file" if path.is_dir() else "does not exist"
        raise ModelNotFoundError(f"model {name_or_path} {what}")
    found = _model_at(models_dir / name_or_path)
    if found is not None:
        return found
    raise ModelNotFoundError(
        f"no model {name_or_path!r}: no such file or directory, and not in {models_dir}; "
        f"run `fluxion pull {name_or_path}`"
    )


def _home(path: str) -> Path:
    """A path below a home directory, which must be known.

    Raises:
        ConfigError: it is not.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{path}: this user has no home directory; say where models are (--models-dir), or set "
            f"HOME or XDG_DATA_HOME"
        ) from None


def _model_at(path: Path) -> Path | None:
    """The file itself, a safetensors directory, or the one GGUF file of a directory."""
    if path.is_file():
        return path
    files = sorted(path.glob("*.gguf")) if path.is_dir() else []
    # GGUF files are published with the config.json of the model that they were made from.
    is_beside = bool(files) and not any(path.glob("*.safetensors"))
    if (path / "config.json").is_file() and not is_beside:
        return path
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ModelNotFoundError(f"{path} holds several GGUF files ({names}); name one by its path")
    if files:
        _check_name(str(files[0]))
    return files[0] if files else None


def _check_name(path: str) -> None:
    """Refuse a name that no message can carry: nodes tell each other their models' names.

    Raises:
        ConfigError: it is not UTF-8 text.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"the model's name {path!r} is not UTF-8 text; rename the file or its directory"
        ) from None
