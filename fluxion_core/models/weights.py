"""Load a model from a GGUF file or a safetensors directory, piece by piece.

Names and shapes are checked before memory is taken; then a few threads fill the decoder, each with
some MiB of its own. Peak memory is the model plus that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fluxion_core.errors import ModelFileError, ModelNotFoundError
from fluxion_core.models import gguf_file
from fluxion_core.models.config import ModelConfig
from fluxion_core.models.decoder import Decoder, tensor_shapes
from fluxion_core.models.gguf_index import open_gguf
from fluxion_core.models.random_weights import (
    draw_weights,
    has_random_weights,
    revision_of,
    seed_of,
)
from fluxion_core.models.safetensors_dir import read_config
from fluxion_core.models.safetensors_files import SafetensorsWeights, weight_files


@dataclass(frozen=True)
class LoadedModel:
    """A decoder with its weights, and what identifies them."""

    name: str
    """For people: the file's or directory's name."""
    decoder: Decoder
    config: ModelConfig
    revision_hash: str
    """Hex; equal for equal files, whatever they are called."""


class WeightSource(Protocol):
    """Source of weights under their Hugging Face names. `pieces` is thread-safe."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of all weights that are there."""
        ...

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of one weight, in order and without gaps; any floating dtype."""
        ...


def load_model(path: Path, *, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """Read a model's weights.

    Args:
        path: a .gguf file or a directory with config.json and safetensors, or with a file that says
            that the weights are random (random_weights.py).
        device: where weights go.
        dtype: of weights and activations.

    Raises:
        ModelNotFoundError: nothing is at the path.
        ModelFileError: truncated or malformed files, missing tensors, wrong shapes.
        UnsupportedModelError: an architecture or option that is not implemented.
    """
    if not path.exists():
        raise ModelNotFoundError(f"{path}: no such file or directory")
    if has_random_weights(path):
        return _draw(path, device, dtype)
    config, source, files = _open(path)
    # Nothing is allocated for a file that does not hold what its config promises.
    _check_complete(source, config, path)
    decoder = Decoder(config, device, dtype)
    decoder.eval()
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        # The hash reads what the weights are made from, so both read the file once.
        revision = pool.submit(_revision_hash, files)
        for _ in pool.map(partial(_fill, decoder, source), source.shapes):
            pass
    name = path.stem if path.is_file() else path.name
    return LoadedModel(name, decoder, config, revision.result())


def _draw(path: Path, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """A model of random weights, whose name says so."""
    config, seed = read_config(path), seed_of(path)
    decoder = Decoder(config, device, dtype)
    decoder.eval()
    draw_weights(decoder, seed)
    name = f"{path.name}, random weights"
    return LoadedModel(name, decoder, config, revision_of(path, decoder))


def _open(path: Path) -> tuple[ModelConfig, WeightSource, list[Path]]:
    """Config, weights, and the files whose content identifies the model."""
    try:
        if path.is_dir():
            config = read_config(path)
            weights = SafetensorsWeights(path)
            files = [path / "config.json", *weight_files(path)]
            return weights.settled(config), weights, files
        file = open_gguf(path)
        config = gguf_file.read_config(file)
        return config, gguf_file.GgufWeights(file, config), [path]
    except ModelFileError as error:
        # A value out of its range does not know which file it came from.
        where = "" if str(path) in str(error) else f"{path}: "
        raise ModelFileError(f"{where}{error}") from None


def _check_complete(source: WeightSource, config: ModelConfig, path: Path) -> None:
    stored = source.shapes
    if config.num_layers > len(stored):
        raise ModelFileError(
            f"{path}: the config says {config.num_layers} layers, the file has {len(stored)} "
            f"tensors; fetch it again"
        )
    expected = tensor_shapes(config)
    missing = [name for name in expected if name not in stored]
    if missing:
        some = ", ".join(missing[:3])
        raise ModelFileError(f"{path}: {len(missing)} tensors are missing, the first: {some}")
    for name, shape in stored.items():
        if name not in expected:
            raise ModelFileError(f"{path}: tensor {name} has no place in this architecture")
        if shape != expected[name]:
            raise ModelFileError(
                f"{path}: tensor {name} is {shape}; the config says {expected[name]}"
            )


def _fill(decoder: Decoder, source: WeightSource, name: str) -> None:
    target = decoder.weight(name)
    for first, piece in source.pieces(name):
        target[first : first + piece.shape[0]].copy_(piece)


def _revision_hash(files: Sequence[Path]) -> str:
    """SHA-256 of the file, or over the hashes of several: equal files are one model anywhere."""
    hashes = []
    for path in files:
        with path.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256"))
    if len(hashes) == 1:
        return hashes[0].hexdigest()
    return hashlib.sha256(b"".join(each.digest() for each in hashes)).hexdigest()
