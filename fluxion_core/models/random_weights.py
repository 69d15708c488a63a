"""Models whose weights are drawn, not read: a shape to be timed, without an answer worth reading.

A directory of such a model has config.json and tokenizer.json like any other, and in the place of
safetensors a file random_weights.json: {"seed": N}. Weights are drawn where they are to be, so that
a model of 16 GB is there in a second. What they are depends on the kind of device and on the dtype
as well as on the seed, and so does the model's revision: two nodes with one revision have the same
weights.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from fluxion_core.errors import ModelFileError
from fluxion_core.models.config_fields import ConfigFields
from fluxion_core.models.decoder import Decoder
from fluxion_core.models.json_files import read_json

RANDOM_WEIGHTS_FILE = "random_weights.json"


def has_random_weights(path: Path) -> bool:
    """Whether a model's weights are to be drawn.

    Raises:
        ModelFileError: the directory holds weights too.
    """
    is_random = (path / RANDOM_WEIGHTS_FILE).is_file()
    if is_random and any(path.glob("*.safetensors")):
        raise ModelFileError(
            f"{path} holds {RANDOM_WEIGHTS_FILE} and safetensors; remove one of them"
        )
    return is_random


def seed_of(directory: Path) -> int:
    """The seed of a directory's weights.

    Raises:
        ModelFileError: random_weights.json is malformed, or holds anything else.
    """
    path = directory / RANDOM_WEIGHTS_FILE
    entries = read_json(path)
    if set(entries) != {"seed"}:
        raise ModelFileError(f'{path} holds {sorted(entries)}; must be {{"seed": N}}')
    return ConfigFields(entries, path).integer("seed")


def draw_weights(decoder: Decoder, seed: int) -> None:
    """Overwrite all weights: ones in vectors, in matrices normal numbers of a standard deviation
    that keeps activations finite (1 / sqrt of the columns).
    """
    device = decoder.embedding.device
    generator = torch.Generator(device).manual_seed(seed)
    for weight in decoder.parameters():
        if weight.dim() == 1:
            weight.data.fill_(1.0)
        else:
            weight.data.normal_(std=weight.shape[-1] ** -0.5, generator=generator)


def revision_of(directory: Path, decoder: Decoder) -> str:
    """SHA-256, hex, of what the weights come from: both files, the kind of device, the dtype."""
    weights = decoder.embedding
    parts = [
        *((directory / name).read_bytes() for name in ("config.json", RANDOM_WEIGHTS_FILE)),
        f"{weights.device.type} {weights.dtype}".encode(),
    ]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
