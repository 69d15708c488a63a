"""The profile of a prompt that was computed here: made from the store, in slices between steps.

The numbers are those of `planning.prompt_estimate`, which is for whoever has the KV at hand in
float32 and nobody waiting. Here K and V are read in place by the CPU pool's threads
(kernels/native/plan/prompt_needs.h), and whoever runs steps says how much is done at a time, so
that streams go on meanwhile.

Blocks are ranked by the store's own digests, as steps rank them: with 8-bit digests their order may
differ a little from that of exact ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from fluxion_core.errors import FluxionError
from fluxion_core.geometry import BLOCK_SIZES, WindowSpec, ceil_div
from fluxion_core.kernels import _native
from fluxion_core.kernels.isa import native_layout
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.planning.constants import RADII
from fluxion_core.planning.profiled_queries import KeptQueries
from fluxion_core.planning.prompt_estimate import blocks_of_budgets
from fluxion_core.planning.prompt_profile import PromptProfile, profile_shapes
from fluxion_core.pool.cpu_pool import WAKE_BYTES, CpuPool

_MOST_OF_A_TILE = 128
"""Work of a tile in one round of the pool: some tenths of a millisecond. The pool takes a thread
that is much longer at something for one that has lost its CPU."""


class PromptProfiling:
    """One prompt's profile, in the making. The thread of the pool's rounds only.

    Args:
        sequence: whose prompt is whole in the store, and stays there until the profile is done.
        window: the default window.
        queries: of each layer and its profiled tokens, unscaled; all are taken.
        pool: threads that do the work, with the calling one.

    Cost: reads the KV once for 16 rows of a KV head; 4 * rows * heads * tokens * head_dim
    operations a layer. Holds 0.5 MB and 4 B a token for each 16 rows of a KV head, of up to 1,024.
    """

    def __init__(
        self,
        sequence: SequenceKv,
        window: WindowSpec,
        queries: KeptQueries,
        pool: CpuPool,
    ) -> None:
        geometry = sequence.store.geometry
        tokens = sequence.num_prompt_tokens
        positions = queries.positions
        rows = len(positions)
        self._queries = [queries.take(layer) for layer in range(geometry.num_layers)]
        heads = self._queries[0].shape[1]
        self._pool = pool
        self._sequence = sequence  # whose table of slabs the native side reads
        regions = [window.retrieval_region(position + 1) for position in positions]
        edges = torch.tensor([(region.start, region.stop) for region in regions])
        touched = torch.tensor(
            [
                [ceil_div(region.stop, size) - region.start // size if region else 0]
                for region in regions
                for size in BLOCK_SIZES
            ]
        ).view(rows, len(BLOCK_SIZES))
        counts = blocks_of_budgets(touched).int().contiguous()
        self._native = _native.PromptNeeds(
            native_layout(geometry),
            sequence.slab_table.numpy(),
            tokens,
            len(positions.last),
            heads,
            np.array(list(positions), np.int64),
            edges.numpy(),
            counts.numpy(),
            RADII,
        )
        self._shapes = profile_shapes(heads, geometry.num_kv_heads)
        self.profiles: list[PromptProfile] = []
        """Of each layer that is done."""
        self._begin_layer()

    @property
    def num_tiles(self) -> int:
        """Parts of a layer that go on beside each other at most, each on one thread."""
        return self._native.num_tiles

    @property
    def is_done(self) -> bool:
        """Whether all layers are."""
        return len(self.profiles) == len(self._queries)

    def advance(self, work: int) -> int:
        """Go on by about so much work; returns what was done, more than 0 before the end.

        Args:
            work: blocks of 16 tokens that are read for 16 rows of a KV head, or what costs as much.
                Each tile does at least one piece of up to 8, and ends a piece that it has begun.

        Raises:
            FluxionError: a layer's values are not finite: its KV or its queries hold such values.
        """
        done = 0
        while done < work and not self.is_done:
            share = min(_MOST_OF_A_TILE, max(1, (work - done) // self.num_tiles))
            part = self._native.advance(self._pool.native, share, WAKE_BYTES)
            done += part
            if not part:
                self._end_layer()
        return done

    def _begin_layer(self) -> None:
        layer = len(self.profiles)
        self._native.begin_layer(layer, self._queries[layer].numpy())

    def _end_layer(self) -> None:
        # NumPy's: torch would wake its own threads for it.
        parts = {name: np.empty(shape, np.float32) for name, shape in self._shapes.items()}
        self._native.finish_layer(*parts.values())
        if not all(np.isfinite(part).all() for part in parts.values()):
            raise FluxionError(
                f"the prompt's profile holds values that are not finite in layer "
                f"{len(self.profiles)}: its KV or its queries do"
            )
        self.profiles.append(
            PromptProfile(**{name: torch.from_numpy(part) for name, part in parts.items()})
        )
        if not self.is_done:
            self._begin_layer()


_NEW_SHARE = 0.3
"""What the last time weighs in a mean."""

_FIRST_WORK = 64
"""Of the first part of a slice, of which nobody knows how long it takes."""

_LEAST_PARTS, _MOST_PARTS = 4, 8
"""That a slice is done in: the more, the closer to its time it ends."""


class ProfilePace:
    """Pace of a profile: at a time, what takes as long as one layer of a step.

    Args:
        num_layers: of the model.
        clock: seconds.
    """

    def __init__(self, num_layers: int, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._num_layers = num_layers
        self._clock = clock
        self._step_seconds: float | None = None
        self._chunk_seconds = 0.0
        self._work = _FIRST_WORK

    def step_took(self, seconds: float) -> None:
        """A step, all its layers and the logits."""
        self._step_seconds = _mean(self._step_seconds, seconds)

    def chunk_took(self, seconds: float) -> None:
        """A prompt's chunk: what is gone by as long as there was no step."""
        self._chunk_seconds = seconds

    @property
    def layer_seconds(self) -> float:
        """Seconds of a step's layer; before the first step, half of a layer of the last chunk."""
        step = self._chunk_seconds / 2 if self._step_seconds is None else self._step_seconds
        return step / self._num_layers

    def advance(self, profiling: PromptProfiling) -> None:
        """Do a slice of a profile, in parts, until another one would take too long."""
        limit = self.layer_seconds
        started = now = self._clock()
        while not profiling.is_done:
            before = now
            profiling.advance(self._work)
            now = self._clock()
            if now - before > limit / _LEAST_PARTS:
                self._work = max(1, self._work // 2)
            elif now - before < limit / _MOST_PARTS:
                self._work *= 2
            if now - started + limit / _LEAST_PARTS > limit:
                return


def _mean(before: float | None, new: float) -> float:
    return new if before is None else before + _NEW_SHARE * (new - before)
