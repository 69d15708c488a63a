"""The weights of a model directory: model.safetensors, or the files that an index names.

A file that lies beside these and would be part of the model elsewhere is refused or named in the
log: an adapter, a second set of weights, files that no index names.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fluxion_core.errors import ModelFileError, UnsupportedModelError
from fluxion_core.models.config import ModelConfig
from fluxion_core.models.json_files import read_json
from fluxion_core.models.rope import inverse_frequencies
from fluxion_core.observe.log import event

_log = logging.getLogger(__name__)
_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
# Which library's layout the tensors have, as transformers tells them apart.
_FORMATS = ("pt", "mlx")
_DTYPES = ("F32", "F16", "BF16")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Old exporters store what a config says already.
_FREQUENCIES = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_COMPARED_ROWS = 512


class SafetensorsWeights:
    """The weights of a directory's safetensors files.

    Raises:
        ModelFileError: a file is missing, truncated or malformed, a tensor comes twice, or the
            index is of other files.
        UnsupportedModelError: a tensor is not of a floating-point dtype.
    """

    def __init__(self, directory: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, safe_open] = {}
        self._names: dict[str, str] = {}
        index = _read_index(directory)
        for path in weight_files(directory):
            try:
                names = self._add(path)
            except (SafetensorError, OSError) as error:
                raise ModelFileError(
                    f"{path}: damaged or truncated safetensors file ({error}); fetch it again"
                ) from None
            lost = [name for name, file in index.items() if file == path.name and name not in names]
            if lost:
                raise ModelFileError(
                    f"{path}: lacks {lost[0]}, which the index says is there; fetch it again"
                )

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """One weight in the file's dtype, as (0, all rows): a view of the mapped file."""
        stored = self._names.get(name, name)
        yield 0, cast(Tensor, self._files[stored].get_tensor(stored))  # type: ignore[no-untyped-call]

    def settled(self, config: ModelConfig) -> ModelConfig:
        """Decide what copies are: of the embedding in the head, of rotary frequencies.

        A stored head that is no copy is used, whatever the config says of tying. A head without an
        embedding is both. Frequencies are computed; stored ones that differ are named in the log.

        Returns:
            the config that these weights are for.
        """
        self._drop_frequencies(config)
        if not config.tie_word_embeddings or _HEAD not in self.shapes:
            return config
        if _EMBEDDING not in self.shapes:
            self._names[_EMBEDDING] = _HEAD
            self.shapes[_EMBEDDING] = self.shapes.pop(_HEAD)
            return config
        if self._are_equal(_HEAD, _EMBEDDING):
            del self.shapes[_HEAD]
            return config
        _log.warning(
            event("tie_word_embeddings is true, but the stored head is another; it is used")
        )
        return replace(config, tie_word_embeddings=False)

    def _are_equal(self, name: str, other: str) -> bool:
        if self.shapes[name] != self.shapes[other]:
            return False
        one, two = (next(self.pieces(each))[1] for each in (name, other))
        return all(
            torch.equal(rows.float(), same.float())
            for rows, same in zip(
                torch.split(one, _COMPARED_ROWS), torch.split(two, _COMPARED_ROWS), strict=True
            )
        )

    def _drop_frequencies(self, config: ModelConfig) -> None:
        expected = inverse_frequencies(config.rope, config.head_dim)
        for name in [name for name in self.shapes if _FREQUENCIES.fullmatch(name)]:
            stored = next(self.pieces(name))[1].float()
            # Stored in half precision at times.
            if stored.shape != expected.shape or not torch.allclose(stored, expected, rtol=1e-2):
                _log.warning(event("stored rotary frequencies are not the config's", tensor=name))
            del self.shapes[name]

    def _add(self, path: Path) -> set[str]:
        file = safe_open(path, framework="pt")
        form = (file.metadata() or {}).get("format", _FORMATS[0])  # type: ignore[no-untyped-call]
        if form not in _FORMATS:
            raise UnsupportedModelError(
                f"{path}: format is {form!r}; supported: {', '.join(_FORMATS)}"
            )
        names = cast(list[str], file.keys())  # type: ignore[no-untyped-call]
        for name in names:
            if name in self._files:
                raise ModelFileError(f"{path}: tensor {name} comes twice")
            entry = file.get_slice(name)  # type: ignore[no-untyped-call]
            if entry.get_dtype() not in _DTYPES:
                raise UnsupportedModelError(
                    f"{path}: tensor {name} is {entry.get_dtype()}; supported: {', '.join(_DTYPES)}"
                )
            self._files[name] = file
            self.shapes[name] = tuple(entry.get_shape())
        return set(names)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, in a fixed order.

    Raises:
        ModelFileError: there are none, the index names one that is missing, or there are two sets.
        UnsupportedModelError: an adapter lies beside the model.
    """
    if (directory / _ADAPTER).is_file():
        raise UnsupportedModelError(
            f"{directory / _ADAPTER}: an adapter changes the model's weights; merge it into them"
        )
    index = directory / _INDEX
    found = sorted(directory.glob("*.safetensors"))
    if index.is_file():
        files = [directory / name for name in sorted(set(_read_index(directory).values()))]
    else:
        files = [path for path in found if path.name == _ONE_FILE] or found
        if len(files) > 1:
            names = ", ".join(path.name for path in files[:3])
            raise ModelFileError(
                f"{directory} holds {names}, but no {_INDEX}; fetch the model again"
            )
    try:
        missing = [file.name for file in files if not file.is_file()]
    except OSError as error:
        # Of a name that no file can have.
        raise ModelFileError(f"{index}: {error.strerror}") from None
    if missing or not files:
        what = f"lacks {', '.join(missing)}" if missing else "holds no safetensors file"
        raise ModelFileError(f"{directory} {what}; fetch the model again")
    one = directory / _ONE_FILE
    if one in found and one not in files:
        raise ModelFileError(f"{directory} holds {_ONE_FILE} and {_INDEX} of other files; keep one")
    if others := [path.name for path in found if path not in files]:
        _log.warning(
            event("safetensors files beside the model's are not read", files=", ".join(others))
        )
    return files


def _read_index(directory: Path) -> dict[str, str]:
    """File names by tensor; empty without an index."""
    path = directory / _INDEX
    if not path.is_file():
        return {}
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelFileError(f"{path}: has no weight_map")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelFileError(f"{path}: weight_map names files that are no text")
    if elsewhere := next((name for name in weight_map.values() if Path(name).name != name), None):
        raise ModelFileError(f"{path}: weight_map names {elsewhere!r:.60}, which lies elsewhere")
    return weight_map
