"""The host KV store: slabs in one arena, owned by sequences, shared by prefix.

A slab is always in exactly one of four states:

    free       nobody's
    reserved   promised to a sequence, not yet taken; only a number, no particular slab
    used       held by one or more sequences
    cached     held by none, but a full piece of some prompt: found again by its hash, or given up,
               oldest first, when a reservation needs the room

    capacity = free + reserved + used + cached, at every moment.

Life of a sequence: `reserve` (all the memory it can ever need, or CapacityError), `write_blocks`
until every layer is whole, `commit`, one `StepAppend` per generated token, `release`.

Full slabs of a prompt are published at commit under a hash of the model and of all tokens up to
their end; a later prompt with the same beginning holds the same slabs. Stored KV is never moved.

Locks: one, around the accounting; never held while KV is copied. `write_blocks`, `commit` and
appends of one sequence must not overlap each other or its release; different sequences may do what
they like on different threads.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fluxion_core.errors import CapacityError, FluxionError, FrameFormatError, StreamTruncatedError
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry, ceil_div
from fluxion_core.kernels.block_digest import cpu as block_digest
from fluxion_core.kvstore.arena import Arena

SLAB_ALIGNMENT_BYTES = 4096


@dataclass(frozen=True)
class StoreStatistics:
    """One consistent look at the accounting. The four states add up to the capacity."""

    capacity_bytes: int
    free_bytes: int
    reserved_bytes: int
    used_bytes: int
    cached_bytes: int
    shared_slabs: int
    """Slabs that more than one sequence holds."""
    sequences: int
    """Sequences that have not been released."""


class HostKvStore:
    """Slabs of host memory for the KV of many sequences of one model.

    Args:
        geometry: layout of a slab.
        capacity_bytes: size of the arena; a whole number of slabs of it is used.
        model_key: identifies the model; prefixes are shared only under the same key.
        populate: touch all memory now.

    Raises:
        CapacityError: not even one slab fits, or the system does not give that much.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        capacity_bytes: int,
        *,
        model_key: bytes,
        populate: bool = False,
    ) -> None:
        self.geometry = geometry
        self.slab_stride_bytes = (
            ceil_div(geometry.slab_bytes, SLAB_ALIGNMENT_BYTES) * SLAB_ALIGNMENT_BYTES
        )
        self.num_slabs = capacity_bytes // self.slab_stride_bytes
        if not self.num_slabs:
            raise CapacityError(
                "host KV store",
                needed=self.slab_stride_bytes,
                free=capacity_bytes,
                unit="B",
                remedy="raise store.host_kv_bytes or lower store.slab_tokens",
            )
        self._arena = Arena(self.num_slabs * self.slab_stride_bytes, populate=populate)
        self.pins_tables = False
        """Whether sequences keep their table of slabs in pinned memory, for a device to read."""
        self._model_key = hashlib.blake2b(model_key, digest_size=16).digest()
        self._lock = threading.Lock()
        # Highest first, so that slabs are taken from the arena's start and untouched pages stay so.
        self._free = list(range(self.num_slabs - 1, -1, -1))
        self._reserved = 0
        self._holders = [0] * self.num_slabs
        self._key_of: list[bytes | None] = [None] * self.num_slabs
        self._published: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._sequences = 0

    def check_can_ever_hold(self, num_tokens: int) -> None:
        """Raise CapacityError if a sequence of this length does not fit the empty store."""
        needed = self.geometry.slabs_for(num_tokens)
        if needed > self.num_slabs:
            raise self._capacity_error(needed, self.num_slabs)

    def reserve(self, token_ids: Sequence[int], max_new_tokens: int) -> SequenceKv:
        """Hold room for a prompt and for every token that may follow it.

        The longest run of full slabs that is already stored for this prompt is held at once; at
        least one prompt token is always left to compute.

        Raises:
            CapacityError: not enough is free now; nothing is held.
        """
        keys = self._prefix_keys(token_ids)
        total = self.geometry.slabs_for(len(token_ids) + max_new_tokens)
        shareable = (len(token_ids) - 1) // self.geometry.slab_tokens
        with self._lock:
            shared = []
            for key in keys[:shareable]:
                if (slab := self._published.get(key)) is None:
                    break
                self._hold(slab)
                shared.append(slab)
            needed = total - len(shared)
            available = len(self._free) - self._reserved + len(self._cached)
            if needed > available:
                for slab in shared:
                    self._let_go(slab)
                raise self._capacity_error(needed, available)
            while len(self._free) - self._reserved < needed:
                self._evict_oldest()
            self._reserved += needed
            self._sequences += 1
        return SequenceKv(self, len(token_ids), keys, shared, total)

    def statistics(self) -> StoreStatistics:
        """The accounting at one moment."""
        stride = self.slab_stride_bytes
        with self._lock:
            free, cached, reserved = len(self._free), len(self._cached), self._reserved
            return StoreStatistics(
                capacity_bytes=self.num_slabs * stride,
                free_bytes=(free - reserved) * stride,
                reserved_bytes=reserved * stride,
                used_bytes=(self.num_slabs - free - cached) * stride,
                cached_bytes=cached * stride,
                shared_slabs=sum(holders > 1 for holders in self._holders),
                sequences=self._sequences,
            )

    @property
    def arena_address(self) -> int:
        """Where the memory of all slabs begins."""
        return self._arena.address

    @property
    def arena_bytes(self) -> int:
        """Its size."""
        return self._arena.size_bytes

    def slab_address(self, slab: int) -> int:
        """Where a slab begins."""
        return self._arena.address + slab * self.slab_stride_bytes

    def slab_kv(self, slab: int) -> Tensor:
        """A slab's KV in place: [layers, kv_heads, blocks, 2 (K, V), 16, head_dim] bfloat16."""
        geometry = self.geometry
        start = slab * self.slab_stride_bytes
        return (
            self._arena.bytes[start : start + geometry.kv_bytes]
            .view(torch.bfloat16)
            .view(
                geometry.num_layers,
                geometry.num_kv_heads,
                geometry.slab_blocks,
                2,
                BLOCK_TOKENS,
                geometry.head_dim,
            )
        )

    def slab_digest(self, slab: int, level: int) -> Tensor:
        """A slab's digests of one level in place: [layers, kv_heads, records, record bytes] uint8.

        See KvGeometry for what a record is. Blocks that are not complete hold anything.
        """
        geometry = self.geometry
        heads = self.slab_digests(slab).view(
            geometry.num_layers, geometry.num_kv_heads, geometry.head_digest_bytes
        )
        offset = geometry.level_offset(level)
        level_bytes = heads[..., offset : offset + geometry.level_bytes(level)]
        records: Tensor = torch.unflatten(level_bytes, -1, (geometry.level_records(level), -1))
        return records

    def slab_digests(self, slab: int) -> Tensor:
        """All digests of a slab in place: [digest_bytes] uint8."""
        start = slab * self.slab_stride_bytes + self.geometry.kv_bytes
        digests: Tensor = self._arena.bytes[start : start + self.geometry.digest_bytes]
        return digests

    def take_reserved(self) -> int:
        """Turn one reserved slab into a used one. For SequenceKv."""
        with self._lock:
            self._reserved -= 1
            slab = self._free.pop()
            self._holders[slab] = 1
        return slab

    def publish(self, slab: int, key: bytes) -> int:
        """Make a full slab findable; returns the slab to hold from now on. For SequenceKv.

        That is another one if the same content was published meanwhile; ours is then free.
        """
        with self._lock:
            published = self._published.get(key)
            if published is None:
                self._published[key] = slab
                self._key_of[slab] = key
                return slab
            if published != slab:
                self._hold(published)
                self._let_go(slab)
            return published

    def give_back(self, slabs: Sequence[int], num_reserved: int) -> None:
        """End a sequence's hold on its slabs and on what it never took. For SequenceKv."""
        with self._lock:
            for slab in slabs:
                self._let_go(slab)
            self._reserved -= num_reserved
            self._sequences -= 1

    def _hold(self, slab: int) -> None:
        self._cached.pop(slab, None)
        self._holders[slab] += 1

    def _let_go(self, slab: int) -> None:
        self._holders[slab] -= 1
        if self._holders[slab]:
            return
        if self._key_of[slab] is None:
            self._free.append(slab)
        else:
            self._cached[slab] = None

    def _evict_oldest(self) -> None:
        slab, _ = self._cached.popitem(last=False)
        key = self._key_of[slab]
        assert key is not None
        del self._published[key]
        self._key_of[slab] = None
        self._free.append(slab)

    def _prefix_keys(self, token_ids: Sequence[int]) -> list[bytes]:
        """One chained hash per full slab of the prompt."""
        tokens = np.asarray(token_ids, dtype="<u4")
        size = self.geometry.slab_tokens
        key, keys = self._model_key, []
        for end in range(size, len(tokens) + 1, size):
            piece = tokens[end - size : end].tobytes()
            key = hashlib.blake2b(key + piece, digest_size=16).digest()
            keys.append(key)
        return keys

    def _capacity_error(self, needed_slabs: int, free_slabs: int) -> CapacityError:
        return CapacityError(
            "host KV store",
            needed=needed_slabs * self.slab_stride_bytes,
            free=free_slabs * self.slab_stride_bytes,
            unit="B",
            remedy="lower max_new_tokens or the prompt, retry later, or raise store.host_kv_bytes",
        )


class SequenceKv:
    """One sequence's hold on the store. Made by `HostKvStore.reserve`; ended by `release`."""

    def __init__(
        self,
        store: HostKvStore,
        num_prompt_tokens: int,
        prefix_keys: list[bytes],
        shared_slabs: list[int],
        max_slabs: int,
    ) -> None:
        geometry = store.geometry
        self._store = store
        self._prefix_keys = prefix_keys
        self._slabs = list(shared_slabs)
        self._num_reserved = max_slabs - len(shared_slabs)
        self.num_prompt_tokens = num_prompt_tokens
        self.shared_tokens = len(shared_slabs) * geometry.slab_tokens
        """Prompt tokens that were stored already; their KV need not come again."""
        self.num_tokens = 0
        """Tokens whose KV is whole in every layer: 0 before `commit`."""
        self._next_token = [self.shared_tokens] * geometry.num_layers
        self._is_released = False
        self.slab_table = torch.zeros(max_slabs, dtype=torch.int64, pin_memory=store.pins_tables)
        """[max_slabs] addresses of the sequence's slabs in token order; grows in place."""
        for ordinal, slab in enumerate(shared_slabs):
            self.slab_table[ordinal] = store.slab_address(slab)

    @property
    def store(self) -> HostKvStore:
        """The store that this sequence is held in."""
        return self._store

    @property
    def slabs(self) -> tuple[int, ...]:
        """Slabs held, in token order."""
        return tuple(self._slabs)

    @property
    def held_bytes(self) -> int:
        """Host memory in slabs that hold this sequence's KV, digests and slack included."""
        return len(self._slabs) * self._store.slab_stride_bytes

    def restart(self) -> None:
        """Forget what was written before a commit, so that another hand-off can begin."""
        assert not self.num_tokens
        self._next_token = [self.shared_tokens] * self._store.geometry.num_layers

    def write_blocks(
        self, layer: int, first_token: int, num_tokens: int, payload: bytes | memoryview
    ) -> None:
        """Copy one layer's next blocks into their slabs and digest them.

        Args:
            layer: 0 to num_layers - 1.
            first_token: where this layer's KV ends so far; a multiple of 16.
            num_tokens: a multiple of 16, except at the prompt's end.
            payload: `[kv_head][block][K 16 x D | V 16 x D]` bf16, the last block zero padded.

        Raises:
            FrameFormatError: not the layer's next tokens, beyond the prompt, or of a wrong size.
        """
        geometry = self._store.geometry
        num_blocks = ceil_div(num_tokens, BLOCK_TOKENS)
        if not 0 <= layer < geometry.num_layers or first_token != self._next_token[layer]:
            raise FrameFormatError(f"tokens at {first_token} are not the next of layer {layer}")
        end = first_token + num_tokens
        if num_tokens <= 0 or end > self.num_prompt_tokens:
            raise FrameFormatError(
                f"tokens {first_token} to {end} of a prompt of {self.num_prompt_tokens}"
            )
        if num_tokens % BLOCK_TOKENS and end != self.num_prompt_tokens:
            raise FrameFormatError(f"{num_tokens} tokens at {first_token} end inside a block")
        if len(payload) != geometry.num_kv_heads * num_blocks * geometry.block_bytes:
            raise FrameFormatError(f"{len(payload)} B for {num_tokens} tokens of one layer")
        self._grow_to(end)
        address = np.frombuffer(payload, dtype=np.uint8).ctypes.data
        for ordinal, inside, count in geometry.split_by_slab(first_token, num_tokens):
            done = ordinal * geometry.slab_tokens + inside - first_token
            block_digest.ingest_blocks(
                geometry,
                int(self.slab_table[ordinal]),
                layer,
                inside,
                count,
                address + done // BLOCK_TOKENS * geometry.block_bytes,
                num_blocks * geometry.block_bytes,
            )
        self._next_token[layer] = end

    def commit(self) -> None:
        """Declare the prompt whole; from here on it may be attended to, and is shared.

        Raises:
            StreamTruncatedError: a layer is not whole.
        """
        for layer, next_token in enumerate(self._next_token):
            if next_token != self.num_prompt_tokens:
                raise StreamTruncatedError(
                    f"layer {layer} holds {next_token} of {self.num_prompt_tokens} tokens"
                )
        for ordinal, key in enumerate(self._prefix_keys):
            slab = self._store.publish(self._slabs[ordinal], key)
            self._slabs[ordinal] = slab
            self.slab_table[ordinal] = self._store.slab_address(slab)
        self.num_tokens = self.num_prompt_tokens

    def release(self) -> None:
        """Give everything back. Idempotent; from any state."""
        if self._is_released:
            return
        self._is_released = True
        self._store.give_back(self._slabs, self._num_reserved)
        self._slabs, self._num_reserved = [], 0

    def grow_for_prompt(self) -> None:
        """Take the whole prompt's slabs now, so that layers may be written from many threads."""
        self._grow_to(self.num_prompt_tokens)

    def _grow_to(self, num_tokens: int) -> None:
        """Take reserved slabs until `num_tokens` tokens have a place."""
        if self._is_released:
            raise FluxionError("the sequence has been released")
        while len(self._slabs) * self._store.geometry.slab_tokens < num_tokens:
            if not self._num_reserved:
                raise FluxionError(f"{num_tokens} tokens exceed the sequence's reservation")
            slab = self._store.take_reserved()
            self._num_reserved -= 1
            self.slab_table[len(self._slabs)] = self._store.slab_address(slab)
            self._slabs.append(slab)

    def grow_for_next_token(self) -> tuple[int, int]:
        """Make room for one more token; returns its slab's address and its place there.

        Raises:
            FluxionError: the reservation is used up, or nothing was committed.
        """
        if not self.num_tokens:
            raise FluxionError("a sequence must be committed before tokens are appended")
        self._grow_to(self.num_tokens + 1)
        ordinal, inside = divmod(self.num_tokens, self._store.geometry.slab_tokens)
        return int(self.slab_table[ordinal]), inside


class StepAppend:
    """One generated token of every sequence of a step, written layer by layer.

    What does not change within a step is worked out here, once.
    """

    def __init__(self, geometry: KvGeometry, sequences: Sequence[SequenceKv]) -> None:
        self._geometry = geometry
        self._sequences = sequences
        places = [sequence.grow_for_next_token() for sequence in sequences]
        self._slabs = torch.tensor([slab for slab, _ in places], dtype=torch.int64)
        self._tokens = torch.tensor([token for _, token in places], dtype=torch.int64)

    @property
    def addresses(self) -> tuple[int, int]:
        """Of the slabs that take the tokens, and of the places there; both int64."""
        return self._slabs.data_ptr(), self._tokens.data_ptr()

    def append(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Write one layer. key, value: see `block_digest.append_tokens`."""
        block_digest.append_tokens(self._geometry, self._slabs, self._tokens, layer, key, value)

    def advance(self) -> None:
        """Count the token, after the last layer."""
        for sequence in self._sequences:
            sequence.num_tokens += 1
