"""Places in device memory for the digests of a store's slabs, and which slabs have them.

There are as many places as there is room for, at most one a slab. Slabs of running sequences keep
theirs. Those of sequences that have ended keep them too, until a slab of a running one needs a
place: then the least recently used gives its own up. Where running sequences alone have more slabs
than there are places, the rest waits for one to end; nothing depends on a place but time.

Nothing is copied here (digests.py).
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice

import numpy as np
import numpy.typing as npt

from fluxion_core.kernels.tier.constants import ABSENT


class DigestPlaces:
    """Places of a store's slabs. At first those from the arena's start have them, slab by slab.

    Args:
        of_slab: [slabs] int32, written here from now on: a slab's place, or ABSENT.
        num_places: 1 or more, at most the number of slabs.
    """

    def __init__(self, of_slab: npt.NDArray[np.int32], num_places: int) -> None:
        self.of_slab = of_slab
        """[slabs] int32: a slab's place, or ABSENT."""
        of_slab[:] = ABSENT.value
        of_slab[:num_places] = np.arange(num_places)
        self._num_places = num_places
        self._holders = [0] * len(of_slab)
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_places))
        """Slabs with a place that nobody holds, the least recently held first."""
        self._waiting: dict[int, None] = {}
        """Slabs without one that somebody holds, in the order in which they came."""

    @property
    def num_held(self) -> int:
        """Slabs that somebody holds and that have a place: nobody takes it from them."""
        return self._num_places - len(self._idle)

    @property
    def num_waiting(self) -> int:
        """Slabs that somebody holds and that have no place."""
        return len(self._waiting)

    def hold(self, slab: int) -> None:
        """Count one more sequence that runs with a slab."""
        self._holders[slab] += 1
        if self._holders[slab] > 1:
            return
        if self.of_slab[slab] < 0:
            self._waiting[slab] = None
        else:
            del self._idle[slab]

    def let_go(self, slab: int) -> bool:
        """Count one less; of slabs that nobody holds any more this is the last one used.

        Returns:
            Whether nobody holds it any more.
        """
        self._holders[slab] -= 1
        if self._holders[slab]:
            return False
        if self.of_slab[slab] < 0:
            del self._waiting[slab]
        else:
            self._idle[slab] = None
        return True

    def give(self) -> list[int]:
        """Give places to slabs that wait, as far as there are any that nobody holds.

        Returns:
            Slabs that have a place now, and whose digests are not there yet.
        """
        given = list(islice(self._waiting, len(self._idle)))
        for slab in given:
            loser, _ = self._idle.popitem(last=False)
            self.of_slab[slab], self.of_slab[loser] = self.of_slab[loser], ABSENT.value
            del self._waiting[slab]
        return given
