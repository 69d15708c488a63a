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

import numpy as np
import torch
from torch import Tensor

from fluxion_core.errors import (
    CapacityError,
    FluxionError,
    FrameFormatError,
    NonFiniteKvError,
    StreamTruncatedError,
)
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry, ceil_div
from fluxion_core.kernels.block_digest import cpu as block_digest
from fluxion_core.kernels.block_digest import reference
from fluxion_core.kvstore.arena import Arena
from fluxion_core.kvstore.prefix_index import (
    NamedPrompt,
    Prefix,
    PrefixIndex,
    TailName,
    TokenArray,
    token_array,
)

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

    def publish(self, slab: int, key: bytes, previous: int | None, parent: bytes) -> int | None:
        """Make a full slab findable; returns the slab to hold from now on. For SequenceKv.

        That is another one if the same content was published meanwhile; ours is then free. None if
        the slab before it was withdrawn: this one cannot be found either.

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
                self._let_go(slab)
            return published

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


class SequenceKv:
    """One sequence's hold on the store. Made by `HostKvStore.reserve`; ended by `release`."""

    damage: NonFiniteKvError | None = None
    """What was found in the KV of an appended token; nothing of it may be kept or attended to."""

    def __init__(
        self,
        store: HostKvStore,
        prompt: NamedPrompt,
        prefix: Prefix,
        max_slabs: int,
        approximation: str,
    ) -> None:
        self._store = store
        self._prompt = prompt.tokens
        self._approximation = approximation
        self._root = prompt.root
        self._keys = list(prefix.keys)
        self._slabs = list(prefix.slabs)
        self._num_reserved = max_slabs - len(self._slabs)
        self._tail = None if prefix.tail is None else (self._slabs[-1], prefix.tail)
        self.num_prompt_tokens = len(prompt.tokens)
        self.shared_tokens = prefix.num_tokens
        """Prompt tokens that were stored already."""
        self.exact_tokens = prefix.exact_tokens
        """First tokens whose KV is exact, of those that are stored."""
        self.num_tokens = 0
        """Tokens whose KV is whole in every layer: 0 before `commit` or `begin_prompt`."""
        self._may_append = False
        self._next_token = [self.kv_from_token] * store.geometry.num_layers
        self._is_released = False
        self.slab_table = torch.zeros(max_slabs, dtype=torch.int64, pin_memory=store.pins_tables)
        """[max_slabs] addresses of the sequence's slabs in token order; grows in place."""
        for ordinal, slab in enumerate(self._slabs):
            self.slab_table[ordinal] = store.slab_address(slab)

    @property
    def store(self) -> HostKvStore:
        """The store that this sequence is held in."""
        return self._store

    @property
    def kv_from_token(self) -> int:
        """Where `write_blocks` begins: what is stored before, down to a whole block."""
        return self.shared_tokens // BLOCK_TOKENS * BLOCK_TOKENS

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
        assert not self._may_append
        self._next_token = [self.kv_from_token] * self._store.geometry.num_layers

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
            NonFiniteKvError: K or V of one of them is NaN or infinite.
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
        self._tail = None
        address = np.frombuffer(payload, dtype=np.uint8).ctypes.data
        is_finite = True
        for ordinal, inside, count in geometry.split_by_slab(first_token, num_tokens):
            done = ordinal * geometry.slab_tokens + inside - first_token
            is_finite &= block_digest.ingest_blocks(
                geometry,
                int(self.slab_table[ordinal]),
                layer,
                inside,
                count,
                address + done // BLOCK_TOKENS * geometry.block_bytes,
                num_blocks * geometry.block_bytes,
            )
        if not is_finite:
            token = first_token + _first_not_finite(geometry, payload, num_tokens)
            raise NonFiniteKvError(layer=layer, token=token)
        self._next_token[layer] = end

    def begin_prompt(self) -> None:
        """Let `StepAppend` add the prompt's tokens too, after those that were stored already.

        `commit` follows when they are all there.
        """
        assert self._next_token == [self.kv_from_token] * self._store.geometry.num_layers
        self.num_tokens = self.shared_tokens
        self._may_append = True

    def commit(self) -> None:
        """Declare the prompt whole; from here on it may be attended to, and is shared.

        Raises:
            StreamTruncatedError: a layer is not whole.
            NonFiniteKvError: see `damage`.
        """
        self._refuse_damage()
        whole = [self.num_tokens] if self._may_append else self._next_token
        for layer, next_token in enumerate(whole):
            if next_token != self.num_prompt_tokens:
                raise StreamTruncatedError(
                    f"layer {layer} holds {next_token} of {self.num_prompt_tokens} tokens"
                )
        if self.exact_tokens == self.shared_tokens:
            # What a prefill node sends is exact; after an approximation it continues one.
            self.exact_tokens = self.num_prompt_tokens
        self._publish_full(self._prompt)
        self.num_tokens = self.num_prompt_tokens
        self._may_append = True

    def keep(self, generated_token_ids: Sequence[int]) -> None:
        """Leave what is stored to be found after `release`: full slabs now, the tail then.

        To be called when no step is under way and all of them went well; nothing may be appended
        afterwards. Before `commit` or `begin_prompt` there is nothing to keep.

        Args:
            generated_token_ids: that followed the prompt; those whose KV is not stored (the last
                one, as a rule) may be among them.

        Raises:
            NonFiniteKvError: see `damage`.
        """
        self._refuse_damage()
        stored = np.concatenate([self._prompt, token_array(generated_token_ids)])[: self.num_tokens]
        assert len(stored) == self.num_tokens, "a stored token has no name"
        if self.num_tokens > self.exact_tokens and not self._approximation:
            raise FluxionError(
                f"KV of tokens from {self.exact_tokens} on is approximate, and the sequence was "
                f"reserved for exact KV; name its approximation in `reserve`"
            )
        self._publish_full(stored)
        rest = stored[len(self._keys) * self._store.geometry.slab_tokens :]
        if len(rest):
            tag = self._tag(len(stored))
            name = self._store.prefixes.tail_name(self._last_key, rest, tag)
            self._tail = self._slabs[len(self._keys)], name

    def _refuse_damage(self) -> None:
        if self.damage is not None:
            raise self.damage

    def withdraw(self) -> None:
        """Take back what can be found of this sequence: it has failed. `release` follows."""
        self._tail = None
        self._store.withdraw(self._slabs)

    def _publish_full(self, tokens: TokenArray) -> None:
        """Publish slabs that these tokens, all stored, fill and that are not published yet; none
        that follows a slab that was withdrawn."""
        size = self._store.geometry.slab_tokens
        for ordinal in range(len(self._keys), len(tokens) // size):
            end = (ordinal + 1) * size
            piece = tokens[end - size : end]
            key = self._store.prefixes.key_after(self._last_key, piece, self._tag(end))
            previous = self._slabs[ordinal - 1] if ordinal else None
            slab = self._store.publish(self._slabs[ordinal], key, previous, self._last_key)
            if slab is None:
                return
            self._keys.append(key)
            self._slabs[ordinal] = slab
            self.slab_table[ordinal] = self._store.slab_address(slab)

    @property
    def _last_key(self) -> bytes:
        return self._keys[-1] if self._keys else self._root

    def _tag(self, num_tokens: int) -> str:
        """The approximation in the KV of so many tokens; empty if there is none."""
        return "" if num_tokens <= self.exact_tokens else self._approximation

    def release(self) -> None:
        """Give everything back. Idempotent; from any state."""
        if self._is_released:
            return
        self._is_released = True
        self._store.give_back(self._slabs, self._num_reserved, self._tail)
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

    def make_room(self, count: int) -> None:
        """Take the slabs that so many more tokens need, if it has not been done.

        Raises:
            FluxionError: the reservation is used up, or nothing was committed.
        """
        if not self._may_append:
            raise FluxionError("a sequence must be committed before tokens are appended")
        self._grow_to(self.num_tokens + count)

    def grow_for_next_tokens(self, count: int) -> list[tuple[int, int]]:
        """Make room for more tokens; returns of each its slab's address and its place there.

        Raises:
            FluxionError: see `make_room`.
        """
        first, size = self.num_tokens, self._store.geometry.slab_tokens
        self.make_room(count)
        self._tail = None
        return [
            (int(self.slab_table[token // size]), token % size)
            for token in range(first, first + count)
        ]

    def advance(self, count: int, *, is_exact: bool) -> None:
        """Count tokens whose KV is now stored in every layer.

        Args:
            count: how many.
            is_exact: whether they attended to everything before them.
        """
        if is_exact and self.exact_tokens == self.num_tokens:
            self.exact_tokens += count
        self.num_tokens += count


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
        self._slabs = torch.tensor([slab for slab, _ in places], dtype=torch.int64)
        self._tokens = torch.tensor([token for _, token in places], dtype=torch.int64)
        self._first_not_finite = torch.full((len(places),), geometry.num_layers, dtype=torch.int32)

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Of the slabs that take the tokens and of the places there, both int64; and, int32, of the
        first layer in which each token's K or V is not finite, the number of layers if in none."""
        return (
            self._slabs.data_ptr(),
            self._tokens.data_ptr(),
            self._first_not_finite.data_ptr(),
        )

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


def _first_not_finite(geometry: KvGeometry, payload: bytes | memoryview, num_tokens: int) -> int:
    """Of a payload of which one token is not finite: how many tokens are before it."""
    bits = torch.from_numpy(np.frombuffer(payload, dtype=np.int16).copy())
    shape = (geometry.num_kv_heads, -1, 2, BLOCK_TOKENS, geometry.head_dim)
    kv = bits.view(torch.bfloat16).view(shape).transpose(1, 2).flatten(2, 3)
    token = reference.first_not_finite(kv[:, :, :num_tokens])
    assert token is not None, "the native check and torch disagree"
    return token
