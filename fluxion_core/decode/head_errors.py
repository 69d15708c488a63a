"""Head output errors while steps run: now and then, what one group of heads really lost.

A sample is one KV head's group in one layer of one row: it attends to everything once more, and the
outputs are compared (planning/head_profile.py says how an error is measured). A step's outputs are
not touched by it, so no token depends on what is sampled.

What is sampled depends on the row alone. Each sequence has an account: a share of the bytes that
its attention reads is put by, and when there is enough for reading a group in full, one is drawn
for the next step, any layer and KV head with the same chance. So whatever a policy reads, samples
cost that share of it; where the policy reads less, there are fewer. Draws come from the prompt's
checksum: the same request is sampled in the same places again.

The largest output of the layer's heads, which errors are relative to, is taken over the full
outputs of the sampled group and the outputs that the other groups had from their plans.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from fluxion_core.decode.step import HeadErrorSample, StepReads, StepRow
from fluxion_core.decode.work import StepWork
from fluxion_core.geometry import KvGeometry, ceil_div
from fluxion_core.kernels import _native
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.planning.constants import READ_ALL, TINY
from fluxion_core.pool.cpu_pool import WAKE_BYTES, CpuPool

Floats = npt.NDArray[np.float32]


@dataclass
class _Account:
    """Bytes that one sequence may spend on samples, and its draws."""

    random: Random
    free_bytes: float


class HeadErrorSampling:
    """Samples of one body's steps, read by the CPU pool. One thread only.

    A step is `begin_step`, `measure` after the attention of each layer that is due, `end_step`.

    Args:
        geometry: of the store.
        num_heads: query heads of the model.
        pool: whose rounds read in full; free between layers.
        one_in: of so many bytes that attention reads, one is read for samples; 1 or more.
    """

    def __init__(self, geometry: KvGeometry, num_heads: int, pool: CpuPool, *, one_in: int) -> None:
        assert one_in >= 1, "without samples there is nothing to make"
        self._geometry, self._pool, self._one_in = geometry, pool, one_in
        self._group = num_heads // geometry.num_kv_heads
        self._num_groups = geometry.num_layers * geometry.num_kv_heads
        self._of_one_head = _native.SlabLayout(
            self._num_groups, 1, geometry.head_dim, geometry.slab_tokens, geometry.digest_bits
        )
        self._accounts: WeakKeyDictionary[SequenceKv, _Account] = WeakKeyDictionary()
        self._due: dict[int, list[tuple[int, int]]] = {}
        """Of a layer, rows and KV heads."""
        self._rows: Sequence[StepRow] = ()
        self._samples: list[list[HeadErrorSample]] = []

    def begin_step(self, rows: Sequence[StepRow], regions: Sequence[range]) -> None:
        """Draw what is sampled in a step.

        Args:
            rows: of the step, before it stores their new tokens.
            regions: retrieval region of each row.
        """
        self._rows, self._due = rows, {}
        self._samples = [[] for _ in rows]
        for index, (row, region) in enumerate(zip(rows, regions, strict=True)):
            if not region or row.policy.reads_everything:
                continue
            account = self._account(row.sequence)
            price = self._price(row.sequence)
            count = min(int(account.free_bytes / price), self._num_groups)
            if count == 0:
                continue
            account.free_bytes -= count * price
            for group in account.random.sample(range(self._num_groups), count):
                layer, kv_head = divmod(group, self._geometry.num_kv_heads)
                self._due.setdefault(layer, []).append((index, kv_head))

    def is_due(self, layer: int) -> bool:
        """Whether this step has samples in a layer."""
        return layer in self._due

    def measure(self, layer: int, work: StepWork, query: Floats, output: Floats) -> None:
        """Take a layer's samples, when its attention is done and the pool is free.

        Args:
            layer: of the model.
            work: of the step; its tasks are those of this layer.
            query: [rows, heads, head_dim] float32, as attention had it.
            output: [rows, heads, head_dim] float32, what came of it.
        """
        for row, kv_head in self._due[layer]:
            own = query[row, kv_head * self._group : (kv_head + 1) * self._group]
            if not np.isfinite(own).all():
                # Its request ends for it, and is told so elsewhere.
                continue
            level, _ = work.tasks.plan(row, kv_head)
            expected = work.tasks.expected(row, kv_head)
            predicted = None if expected is None else sum(map(math.exp, expected)) / len(expected)
            if level == READ_ALL:
                # It has read everything: nothing to find out.
                sample = HeadErrorSample(0.0, None if predicted is None else 0.0, 0)
            else:
                full = self._read_in_full(row, layer, kv_head, own)
                error = _mean_squared_error(output[row], full, kv_head * self._group)
                sample = HeadErrorSample(error, predicted, self._read_bytes(row))
            self._samples[row].append(sample)

    def end_step(self, reads: Sequence[StepReads]) -> list[StepReads]:
        """The step's reads with its samples; puts by the rows' share of what they read.

        Of a sequence that was damaged in the step there are no samples.

        Args:
            reads: of each row, as counted by the step.
        """
        for row, read in zip(self._rows, reads, strict=True):
            account = self._accounts.get(row.sequence)
            if account is None or row.policy.reads_everything:
                continue
            window = row.sequence.num_tokens * self._geometry.token_bytes - read.region_bytes
            account.free_bytes += (read.total_bytes + window) / self._one_in
        return [
            replace(read, head_errors=tuple(samples))
            if samples and row.sequence.damage is None
            else read
            for row, read, samples in zip(self._rows, reads, self._samples, strict=True)
        ]

    def _account(self, sequence: SequenceKv) -> _Account:
        account = self._accounts.get(sequence)
        if account is None:
            random = Random(sequence.prompt_checksum)
            # Some way to the first sample: else short sequences would never have one.
            account = _Account(random, random.random() * self._price(sequence))
            self._accounts[sequence] = account
        return account

    def _price(self, sequence: SequenceKv) -> float:
        """Bytes of one group's K and V, with the new token's."""
        return (sequence.num_tokens + 1) * self._geometry.token_bytes / self._num_groups

    def _read_bytes(self, row: int) -> int:
        tokens = self._rows[row].sequence.num_tokens + 1
        return ceil_div(tokens, 16) * self._geometry.block_bytes

    def _read_in_full(self, row: int, layer: int, kv_head: int, query: Floats) -> Floats:
        """[group, head_dim] exact outputs of a group, whose queries have the same shape."""
        geometry, group = self._geometry, self._group
        sequence = self._rows[row].sequence
        tokens = sequence.num_tokens + 1
        slabs = sequence.slab_table[: ceil_div(tokens, geometry.slab_tokens)].numpy()
        # For the native side a model with one KV head a layer: the same layer, another slab.
        places = slabs + (layer * (geometry.num_kv_heads - 1) + kv_head) * geometry.head_kv_bytes
        view = np.array([(places.ctypes.data, tokens, 0, 0, True)], np.int64)
        tasks = _native.LayerAttention(self._of_one_head, view, group, [None])
        own = np.ascontiguousarray(query)[None]
        full: Floats = np.empty((1, group, geometry.head_dim), np.float32)
        lse = np.empty((1, group), np.float32)
        tasks.submit(self._pool.native, layer, own, full, lse, WAKE_BYTES)
        self._pool.wait()
        return full.reshape(group, geometry.head_dim)


def _mean_squared_error(output: Floats, full: Floats, first: int) -> float:
    """Mean over a group of squared head output errors.

    Args:
        output: [heads, head_dim] of the layer, as it was.
        full: [group, head_dim], exact.
        first: head of the group.
    """
    end = first + len(full)
    others = np.concatenate((output[:first], full, output[end:])).astype(np.float64)
    largest = max(float((others**2).sum(-1).max()), TINY**2)
    difference = output[first:end].astype(np.float64) - full
    return float((difference**2).sum(-1).mean()) / largest
