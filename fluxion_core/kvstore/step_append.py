"""The tokens that a step adds to its sequences, written into their slabs layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fluxion_core.errors import NonFiniteKvError
from fluxion_core.geometry import KvGeometry
from fluxion_core.kernels.block_digest import cpu as block_digest
from fluxion_core.kvstore.sequence import SequenceKv


class StepAppend:
    """The next tokens of every sequence of a step, written layer by layer.

    What does not change within a step is worked out here, once.

    Args:
        geometry: of the store.
        sequences: that may be appended to.
        counts: tokens of each; one if left out.

    Raises:
        FluxionError: a sequence's reservation is used up, or it has not been committed.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        sequences: Sequence[SequenceKv],
        counts: Sequence[int] | None = None,
    ) -> None:
        self._geometry = geometry
        self._sequences = sequences
        self._counts = [1] * len(sequences) if counts is None else counts
        places = [
            place
            for sequence, count in zip(sequences, self._counts, strict=True)
            for place in sequence.grow_for_next_tokens(count)
        ]
        self._slabs = np.array([slab for slab, _ in places], dtype=np.int64)
        self._tokens = np.array([token for _, token in places], dtype=np.int64)
        self._first_not_finite = np.full(len(places), geometry.num_layers, dtype=np.int32)

    @property
    def arrays(
        self,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Three lists with an entry a token, for the native writers.

        The address of the slab that takes it and its place there; and the first layer in which its
        K or V is not finite, the number of layers if in none.
        """
        return self._slabs, self._tokens, self._first_not_finite

    def append(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Write one layer. key, value: see `block_digest.append_tokens`."""
        block_digest.append_tokens(
            self._geometry, self._slabs, self._tokens, layer, key, value, self._first_not_finite
        )

    def advance(self, are_exact: Sequence[bool]) -> None:
        """Count the tokens, after the last layer. are_exact: see SequenceKv.advance.

        Those of a sequence of which one is not finite do not count: it has `damage` then.
        """
        first = 0
        layers = self._first_not_finite.tolist()
        for sequence, count, is_exact in zip(self._sequences, self._counts, are_exact, strict=True):
            for place, layer in enumerate(layers[first : first + count]):
                if layer < self._geometry.num_layers:
                    token = sequence.num_tokens + place
                    sequence.damage = NonFiniteKvError(layer=layer, token=token)
                    break
            else:
                sequence.advance(count, is_exact=is_exact)
            first += count
