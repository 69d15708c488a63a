"""Units that the heads of a real model read, step by step: recorded once, replayed for any shape.

A unit is a block of 16 tokens of one (layer, KV head). Keys of random numbers have no locality:
what a cache of hot units holds of their selections says nothing. So steps of shapes with random
weights follow selections of a real model, stretched in proportion to their regions. Groups of a
shape take those of the recorded model's groups in turn, of its texts in turn, and each row begins
at another step; steps are gone through forwards and backwards, so that there is no jump at the end.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fluxion_core.errors import ConfigError


@dataclass(frozen=True, eq=False)
class RecordedSelections:
    """Units read by one policy on some texts, over some steps."""

    policy: str
    texts: tuple[str, ...]
    """Names of the texts."""
    changes: tuple[int, ...]
    """Step at which each text's topic changes; -1: it does not."""
    about: dict[str, Any]
    """Model, machine and commit; see lab/provenance.py."""
    bits: npt.NDArray[np.uint8]
    """[texts, steps, layers, kv_heads, group, bytes]: bit u % 8 of byte u // 8 is the sequence's
    unit u. Only units of the region are set."""
    levels: npt.NDArray[np.int8]
    """[texts, steps, layers, kv_heads]: index into BLOCK_SIZES, READ_ALL or READ_NOTHING."""
    regions: npt.NDArray[np.int32]
    """[texts, steps, 2]: first unit of the region, and the one after its last."""

    @property
    def num_steps(self) -> int:
        """Steps of each text."""
        return len(self.bits[0])

    def units(self, text: int, step: int) -> npt.NDArray[np.bool_]:
        """[layers, kv_heads, group, units] bool of one step, by the sequence's units."""
        return np.unpackbits(self.bits[text, step], axis=-1, bitorder="little").astype(np.bool_)

    def save(self, path: Path) -> None:
        """Write it as a compressed npz."""
        words = {
            "policy": self.policy,
            "texts": self.texts,
            "changes": self.changes,
            "about": self.about,
        }
        with path.open("wb") as file:
            np.savez_compressed(
                file,
                words=np.frombuffer(json.dumps(words).encode(), np.uint8),
                bits=self.bits,
                levels=self.levels,
                regions=self.regions,
            )

    @classmethod
    def load(cls, path: Path) -> RecordedSelections:
        """Read what `save` wrote.

        Raises:
            ConfigError: the file is not one.
        """
        try:
            with np.load(path) as file:
                words = json.loads(file["words"].tobytes())
                return cls(
                    words["policy"],
                    tuple(words["texts"]),
                    tuple(words["changes"]),
                    words["about"],
                    file["bits"],
                    file["levels"],
                    file["regions"],
                )
        except (OSError, KeyError, ValueError) as error:
            raise ConfigError(f"recorded selections {path}: {error}") from None
