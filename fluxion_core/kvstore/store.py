"""The host KV store: slabs in one arena, owned by sequences, shared by prefix.

A slab is always in exactly one of four states:

    free       nobody's
    reserved   promised to a sequence, not yet taken; only a number, no particular slab
    used       held by one or more sequences
    cached     held by none, but a full piece of some text, found again by its hash, or some text's
               last piece (its tail); given up, oldest first, when a reservation needs the room

    capacity = free + reserved + used + cached, at every moment.

Life of a sequence: `reserve` (all the memory it can ever need, or CapacityError), `write_blocks`
until every layer is whole, `commit`, one `StepAppend` per generated token, `keep`, `release`.
Where the prompt's new part is computed on this node: `begin_prompt` and a `StepAppend` per chunk in
the place of `write_blocks`.

Full slabs of a prompt are published at commit, those of generated tokens by `keep`, under a hash of
the model and of all tokens up to their end; a later prompt with the same beginning holds the same
slabs. A kept sequence's last slab, filled in part, becomes a tail: the next prompt that goes on
where it ends takes it over and fills it further. Stored KV is never moved.

KV of tokens that were made without attending to everything is an approximation, and so is all that
follows it. Its slabs are named by the approximation too: only sequences of the same one find them.
Exact KV is found by everybody.

All this holds within a domain, for example one client's requests: in another domain nothing is
found, and the same text is stored again.

KV that is NaN or infinite is never published. A sequence that fails takes back (`withdraw`) what it
has published and what it has found: whatever it shares may have been the cause. Who holds such
slabs goes on with them, but publishes nothing that follows them.

Locks: one, around the accounting; never held while KV is copied. `write_blocks`, `commit` and
appends of one sequence must not overlap each other or its release; different sequences may do what
they like on different threads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxion_core.errors import CapacityError
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry, ceil_div
from fluxion_core.kvstore.arena import Arena
from fluxion_core.kvstore.prefix_index import NamedPrompt, PrefixIndex, TailName
from fluxion_core.kvstore.sequence import SequenceKv

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
        self.prefixes = PrefixIndex(model_key, geometry.slab_tokens)
        """Names of slabs; the store's lock is held where it changes."""
        self._lock = threading.Lock()
        # Highest first, so that slabs are taken from the arena's start and untouched pages stay so.
        self._free = list(range(self.num_slabs - 1, -1, -1))
        self._reserved = 0
        self._holders = [0] * self.num_slabs
        self._generations = [0] * self.num_slabs
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._sequences = 0

    def check_can_ever_hold(self, num_tokens: int) -> None:
        """Raise CapacityError if a sequence of this length does not fit the empty store."""
        needed = self.geometry.slabs_for(num_tokens)
        if needed > self.num_slabs:
            raise self._capacity_error(needed, self.num_slabs)

    def reserve(
        self,
        token_ids: Sequence[int],
        max_new_tokens: int,
        *,
        approximation: str = "",
        domain: str = "",
    ) -> SequenceKv:
        """Hold room for a prompt and for every token that may follow it.

        The longest run of slabs that is already stored for this prompt is held at once, and a tail
        after them that the prompt goes on from; at least one token is always left to compute.

        Args:
            token_ids: the prompt.
            max_new_tokens: that may follow.
            approximation: name of what the sequence's steps read in the place of everything, if
                they do: it may go on from KV of that name. Empty: from exact KV only.
            domain: whose KV it may go on from, and who may go on from it.

        Raises:
            CapacityError: not enough is free now; nothing is held.
        """
        prompt = self.prefixes.name(token_ids, domain)
        return self.reserve_named(prompt, max_new_tokens, approximation=approximation)

    def reserve_named(
        self, prompt: NamedPrompt, max_new_tokens: int, *, approximation: str = ""
    ) -> SequenceKv:
        """`reserve`, for who asks more than once: naming a long prompt takes time.

        Args:
            prompt: named by this store's `prefixes`.
            max_new_tokens: see `reserve`.
            approximation: likewise.
        """
        total = self.geometry.slabs_for(len(prompt.tokens) + max_new_tokens)
        with self._lock:
            prefix = self.prefixes.find(prompt, approximation)
            for slab in prefix.slabs:
                self._hold(slab)
            needed = total - len(prefix.slabs)
            available = len(self._free) - self._reserved + len(self._cached)
            if needed > available:
                self._let_go_all(prefix.slabs)
                raise self._capacity_error(needed, available)
            if prefix.tail is not None:
                self.prefixes.forget(prefix.slabs[-1])
            while len(self._free) - self._reserved < needed:
                self._evict_oldest()
            self._reserved += needed
            self._sequences += 1
        return SequenceKv(self, prompt, prefix, total, approximation)

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
        """Address at which the memory of all slabs begins."""
        return self._arena.address

    @property
    def arena_bytes(self) -> int:
        """Size of the memory of all slabs."""
        return self._arena.size_bytes

    def slab_address(self, slab: int) -> int:
        """Address at which a slab begins."""
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
            self._generations[slab] += 1
        return slab

    def generation(self, slab: int) -> int:
        """Count of the times that a slab was taken for new content, or that what a hand-off wrote
        to it was to be written anew. It only goes up. From any thread.

        While it is the same, a block that a retrieval region had in it holds what it held then, so
        that copies of it stay right whoever holds the slab: a prefix that is shared or found again
        keeps its generation. So does a tail that a prompt takes over and fills further: what is
        written are blocks behind its end, and its last block again if that is incomplete. Neither
        was in a region, which ends 128 tokens or more before its sequence does.
        """
        return self._generations[slab]

    def renew(self, slabs: Sequence[int]) -> None:
        """Count slabs as taken for new content: it is written anew. For SequenceKv."""
        with self._lock:
            for slab in slabs:
                self._generations[slab] += 1

    def publish(self, slab: int, key: bytes, previous: int | None, parent: bytes) -> int | None:
        """Make a full slab findable; returns the slab to hold from now on. For SequenceKv.

        That is another one if the same content was published meanwhile; ours is to be let go then.
        None if the slab before it was withdrawn: this one cannot be found either.

        Args:
            slab: that is full.
            key: of it.
            previous: the sequence's slab before it, if it is not the first.
            parent: key of that, or the root of the domain.
        """
        with self._lock:
            if previous is not None and previous not in self.prefixes:
                return None
            published = self.prefixes.publish(slab, key, parent)
            if published != slab:
                self._hold(published)
            return published

    def let_go(self, slab: int) -> None:
        """End a sequence's hold on one slab. For SequenceKv."""
        with self._lock:
            self._let_go(slab)

    def withdraw(self, slabs: Sequence[int]) -> None:
        """Let nobody find these slabs any more, nor what follows them. For SequenceKv."""
        with self._lock:
            for slab in self.prefixes.withdraw(slabs):
                if slab in self._cached:
                    del self._cached[slab]
                    self._free.append(slab)

    def give_back(
        self, slabs: Sequence[int], num_reserved: int, tail: tuple[int, TailName] | None
    ) -> None:
        """End a sequence's hold on its slabs and on what it never took. For SequenceKv.

        Args:
            slabs: in token order.
            num_reserved: what it never took.
            tail: one of the slabs, to be found by this name from now on.
        """
        with self._lock:
            before = slabs[: slabs.index(tail[0])][-1:] if tail is not None else ()
            # After a slab that was withdrawn nothing is to be found.
            if tail is not None and all(slab in self.prefixes for slab in before):
                kept = self.prefixes.keep_tail(*tail)
                if kept != tail[0]:
                    self._cached.move_to_end(kept)
            self._let_go_all(slabs)
            self._reserved -= num_reserved
            self._sequences -= 1

    def _hold(self, slab: int) -> None:
        self._cached.pop(slab, None)
        self._holders[slab] += 1

    def _let_go_all(self, slabs: Sequence[int]) -> None:
        # The last ones first: without its beginning, what follows could not be found.
        for slab in reversed(slabs):
            self._let_go(slab)

    def _let_go(self, slab: int) -> None:
        self._holders[slab] -= 1
        if self._holders[slab]:
            return
        if slab in self.prefixes:
            self._cached[slab] = None
        else:
            self._free.append(slab)

    def _evict_oldest(self) -> None:
        slab, _ = self._cached.popitem(last=False)
        self.prefixes.forget(slab)
        self._free.append(slab)

    def _capacity_error(self, needed_slabs: int, free_slabs: int) -> CapacityError:
        return CapacityError(
            "host KV store",
            needed=needed_slabs * self.slab_stride_bytes,
            free=free_slabs * self.slab_stride_bytes,
            unit="B",
            remedy="lower max_new_tokens or the prompt, retry later, or raise store.host_kv_bytes",
        )
