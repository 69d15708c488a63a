"""A model of a few bytes in three packages, and their wheels, for the tests of pulling."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

from services.cli.package_models import PackageModel, PackagePiece

PIECES = (b"the first piece, ", b"the second, ", b"and the last")


def packaged_model(pieces: tuple[bytes, ...] = PIECES) -> PackageModel:
    """Its description, as the table of real ones has it."""
    whole = b"".join(pieces)
    return PackageModel(
        name="tiny",
        file="tiny.gguf",
        pieces=tuple(
            PackagePiece(f"tiny-model-part{number}", "1.0", f"tiny_model_part{number}/part.bin")
            for number in range(1, len(pieces) + 1)
        ),
        size_bytes=len(whole),
        sha256=hashlib.sha256(whole).hexdigest(),
        licence="of the test, which made it",
    )


def write_wheel(directory: Path, number: int, content: bytes, *, member: str = "part.bin") -> Path:
    """A wheel that pip takes, of the package with this number."""
    package = f"tiny_model_part{number}"
    about = f"{package}-1.0.dist-info"
    wheel = directory / f"{package}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{package}/{member}", content)
        archive.writestr(
            f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{about}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{about}/RECORD", "")
    return wheel
