"""What an interrupted pull leaves: only whole pieces of the same model count."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest

from services.cli.partial_model import PartialModel
from tests.services.cli.packaged_model import PIECES, packaged_model

MODEL = packaged_model()


def stored(directory: Path, count: int) -> PartialModel:
    partial = PartialModel(MODEL, directory)
    for piece in PIECES[partial.num_pieces : count]:
        partial.append(io.BytesIO(piece), lambda _: None)
    return partial


class Breaking(io.BytesIO):
    """Yields a little, then fails as a full disk or a signal does."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell():
            raise OSError("no more")
        return super().read(3)


def test_half_a_piece_is_cut_off(tmp_path: Path):
    partial = stored(tmp_path, 1)
    with pytest.raises(OSError, match="no more"):
        partial.append(Breaking(PIECES[1]), lambda _: None)
    assert (tmp_path / ".pull" / "whole").read_bytes() == PIECES[0] + PIECES[1][:3]
    again = stored(tmp_path, 3)
    assert again.finish(lambda _: None).read_bytes() == b"".join(PIECES)


def test_progress_counts_every_byte_twice_stored_and_checked(tmp_path: Path):
    counts: list[int] = []
    partial = PartialModel(MODEL, tmp_path)
    for piece in PIECES:
        partial.append(io.BytesIO(piece), counts.append)
    partial.finish(counts.append)
    assert sum(counts) == 2 * MODEL.size_bytes


@pytest.mark.parametrize("fault", ["shorter file", "no file", "damaged", "empty"])
def test_a_record_that_does_not_fit_counts_nothing(tmp_path: Path, fault: str):
    stored(tmp_path, 2)
    whole, record = tmp_path / ".pull" / "whole", tmp_path / ".pull" / "pieces.json"
    match fault:
        case "shorter file":
            whole.write_bytes(whole.read_bytes()[:-1])
        case "no file":
            whole.unlink()
        case "damaged":
            record.write_text('{"sha256": 1, "piece_bytes"')
        case "empty":
            record.write_text("{}")
    assert PartialModel(MODEL, tmp_path).num_pieces == 0
    assert stored(tmp_path, 3).finish(lambda _: None).read_bytes() == b"".join(PIECES)


def test_pieces_of_another_model_do_not_count(tmp_path: Path):
    stored(tmp_path, 2)
    assert PartialModel(dataclasses.replace(MODEL, sha256="0" * 64), tmp_path).num_pieces == 0


def test_scratch_is_empty_each_time_and_goes_with_the_rest(tmp_path: Path):
    partial = stored(tmp_path, 3)
    (partial.empty_scratch() / "left").touch()
    assert list(partial.empty_scratch().iterdir()) == []
    partial.finish(lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == [MODEL.file]
