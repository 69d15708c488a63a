"""Load a model from a GGUF file or a safetensors directory, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fluxion_core.errors import ModelFileError, ModelNotFoundError
from fluxion_core.gguf_index import open_gguf
from fluxion_core.models import gguf_file, safetensors_dir
from fluxion_core.models.config import ModelConfig
from fluxion_core.models.decoder import Decoder


@dataclass(frozen=True)
class LoadedModel:
    """A decoder with its weights, and what identifies them."""

    name: str
    """For people: the file's or directory's name."""
    decoder: Decoder
    config: ModelConfig
    revision_hash: str
    """Hex; equal for equal files, whatever they are called."""


def load_model(path: Path, *, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """Read a model's weights.

    Args:
        path: a .gguf file or a directory with config.json and safetensors.
        device: where weights go.
        dtype: of weights and activations.

    Raises:
        ModelNotFoundError: nothing is at the path.
        ModelFileError: truncated or malformed files, missing tensors, wrong shapes.
        UnsupportedModelError: an architecture or option that is not implemented.
    """
    if path.is_dir():
        config = safetensors_dir.read_config(path)
        tensors = safetensors_dir.read_tensors(path, config)
        revision = safetensors_dir.revision_hash(path)
    elif path.is_file():
        reader = open_gguf(path)
        config = gguf_file.read_config(reader, path)
        tensors = gguf_file.read_tensors(reader, config)
        revision = gguf_file.revision_hash(path)
    else:
        raise ModelNotFoundError(f"{path}: no such file or directory")
    decoder = Decoder(config, device, dtype)
    _fill(decoder, tensors, path)
    decoder.eval()
    return LoadedModel(path.stem if path.is_file() else path.name, decoder, config, revision)


def _fill(decoder: Decoder, tensors: Iterator[tuple[str, Tensor]], path: Path) -> None:
    missing = decoder.tensor_names()
    for name, tensor in tensors:
        try:
            decoder.load_tensor(name, tensor)
        except ModelFileError as error:
            raise ModelFileError(f"{path}: {error}") from None
        if name not in missing:
            raise ModelFileError(f"{path}: tensor {name} comes twice")
        missing.remove(name)
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise ModelFileError(f"{path}: {len(missing)} tensors are missing ({some}, …)")
