"""A sequence in the host KV store: the slabs that it holds, from its reservation to its release.

Its life, and what is shared of it, is told at the head of store.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from fluxion_core.errors import (
    FluxionError,
    FrameFormatError,
    NonFiniteKvError,
    StreamTruncatedError,
)
from fluxion_core.geometry import BLOCK_SIZES, BLOCK_TOKENS, KvGeometry, ceil_div
from fluxion_core.kernels.block_digest import cpu as block_digest
from fluxion_core.kernels.block_digest import reference
from fluxion_core.kvstore.prefix_index import NamedPrompt, Prefix, TokenArray, token_array

if TYPE_CHECKING:
    from fluxion_core.kvstore.store import HostKvStore


class Landing(Protocol):
    """Writer of a prompt's KV from other threads, straight into the sequence's slabs."""

    @property
    def whole_tokens(self) -> int:
        """Tokens, from the prompt's first, that are written in every layer. From any thread, also
        after `close`."""

    def close(self) -> None:
        """End it; nothing of it touches slabs any more on return. Idempotent."""


@dataclass(frozen=True)
class LandingPlace:
    """Memory that a landing writes into: each layer's tokens in order, and their digests."""

    slab_addresses: npt.NDArray[np.int64]
    """[slabs] of the whole prompt, in token order."""
    kv_from_token: int
    """First token that is written; a multiple of 16."""
    num_tokens: int
    """Of the prompt, where it ends."""


LandingT = TypeVar("LandingT", bound=Landing)


class WholeKv(NamedTuple):
    """KV of a sequence that is whole in every layer, from its first token on."""

    num_tokens: int
    slabs: tuple[int, ...]
    """That hold it, in token order; perhaps more."""
    generations: tuple[int, ...]
    """Of the slabs: as long as a slab has the same, it holds these tokens as they are now."""


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
        self.num_rewrites = 0
        """Times that what a hand-off had written was given up, to be written anew."""
        self._may_append = False
        self._next_token = [self.kv_from_token] * store.geometry.num_layers
        self._is_released = False
        self._landing: Landing | None = None
        """Open until somebody needs the slabs for something else."""
        self.slab_table = torch.zeros(max_slabs, dtype=torch.int64, pin_memory=store.pins_tables)
        """[max_slabs] addresses of the sequence's slabs in token order; grows in place."""
        for ordinal, slab in enumerate(self._slabs):
            self.slab_table[ordinal] = store.slab_address(slab)

    @property
    def store(self) -> HostKvStore:
        """The store that this sequence is held in."""
        return self._store

    @property
    def prompt_checksum(self) -> int:
        """CRC-32 of the prompt's tokens: a seed that is the prompt's own."""
        return zlib.crc32(self._prompt.tobytes())

    @property
    def kv_from_token(self) -> int:
        """First token for `write_blocks`: the end of what is stored, down to a whole block."""
        return self.shared_tokens // BLOCK_TOKENS * BLOCK_TOKENS

    @property
    def slabs(self) -> tuple[int, ...]:
        """Slabs held, in token order."""
        return tuple(self._slabs)

    @property
    def held_bytes(self) -> int:
        """Host memory in slabs that hold this sequence's KV, digests and slack included."""
        return len(self._slabs) * self._store.slab_stride_bytes

    @property
    def whole_tokens(self) -> int:
        """Tokens whose KV is whole in every layer by now, also before a commit; 0 once it has been
        released. From any thread."""
        if self._is_released:
            return 0
        landing = self._landing
        if landing is not None:
            return landing.whole_tokens
        return self.num_tokens if self._may_append else min(self._next_token)

    def whole(self) -> WholeKv:
        """KV that is whole by now, and where it is.

        From any thread, whatever another one does with the sequence meanwhile, its release
        included. Where that gives slabs up meanwhile, it is nothing.

        Cost: a look at every layer and slab.
        """
        slabs = tuple(self._slabs)
        # In this order: a slab's generation goes up after its tokens have ceased to count.
        generations = tuple(self._store.generation(slab) for slab in slabs)
        num_tokens = self.whole_tokens
        if tuple(self._slabs[: len(slabs)]) != slabs:
            # A generation may be that of another's text.
            return WholeKv(0, (), ())
        room = len(slabs) * self._store.geometry.slab_tokens
        return WholeKv(min(num_tokens, room), slabs, generations)

    def restart(self) -> None:
        """Forget what was written before a commit, so that another hand-off can begin.

        That writes other bits, perhaps, in the same places: their slabs' generations go up.
        """
        assert not self._may_append
        first = self.kv_from_token
        is_written = self._landing is not None or max(self._next_token) > first
        self._close_landing()
        self._next_token = [first] * self._store.geometry.num_layers
        if is_written:
            self._store.renew(self._slabs[first // self._store.geometry.slab_tokens :])
            self.num_rewrites += 1
        if self._tail is None:
            self._digest_begun_blocks()

    def _digest_begun_blocks(self) -> None:
        """Digest again the stored part of the coarse block in which the next token lies.

        What was written behind it is in that block's digest, and the next write would add to it.
        """
        geometry, end = self._store.geometry, self.kv_from_token
        first = end - end % BLOCK_SIZES[-1]
        if first == end:
            return
        ordinal, inside = divmod(first, geometry.slab_tokens)
        blocks = slice(inside // BLOCK_TOKENS, (inside + end - first) // BLOCK_TOKENS)
        stored = self._store.slab_kv(self._slabs[ordinal])[:, :, blocks].clone()
        for layer, kv in enumerate(stored):
            block_digest.ingest_blocks(
                geometry,
                int(self.slab_table[ordinal]),
                layer,
                inside,
                end - first,
                block_digest.payload_of(kv),
            )

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
        assert self._landing is None, "a landing writes this sequence's blocks"
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
        heads = np.frombuffer(payload, dtype=np.uint8).reshape(geometry.num_kv_heads, -1)
        is_finite = True
        for ordinal, inside, count in geometry.split_by_slab(first_token, num_tokens):
            done = ordinal * geometry.slab_tokens + inside - first_token
            begin = done // BLOCK_TOKENS * geometry.block_bytes
            end_of_part = begin + ceil_div(count, BLOCK_TOKENS) * geometry.block_bytes
            is_finite &= block_digest.ingest_blocks(
                geometry,
                int(self.slab_table[ordinal]),
                layer,
                inside,
                count,
                heads[:, begin:end_of_part],
            )
        if not is_finite:
            token = first_token + _first_not_finite(geometry, payload, num_tokens)
            raise NonFiniteKvError(layer=layer, token=token)
        self._next_token[layer] = end

    def open_landing(self, make: Callable[[LandingPlace], LandingT]) -> LandingT:
        """Have the whole prompt's KV written by a landing, in place of `write_blocks`.

        All slabs are taken for it. It is closed by `landed`, and by `restart` and `release`, so
        that it never writes into a slab that is another's.

        Args:
            make: opens the landing at the place that it gets.

        Raises:
            FluxionError: the sequence has been released.
        """
        assert not self._may_append, "the prompt is there, or this node computes it"
        assert self._landing is None, "another landing is open"
        assert self._next_token == [self.kv_from_token] * self._store.geometry.num_layers
        self.grow_for_prompt()
        self._tail = None
        place = LandingPlace(
            self.slab_table[: len(self._slabs)].numpy().copy(),
            self.kv_from_token,
            self.num_prompt_tokens,
        )
        landing = make(place)
        self._landing = landing
        return landing

    def landed(self) -> None:
        """Note that the open landing has written everything, and close it; `commit` may follow."""
        assert self._landing is not None, "no landing is open"
        # First: what is whole must not be less for a moment.
        self._next_token = [self.num_prompt_tokens] * self._store.geometry.num_layers
        self._close_landing()

    def _close_landing(self) -> None:
        if self._landing is not None:
            self._landing.close()
            self._landing = None

    def begin_prompt(self) -> None:
        """Let `StepAppend` add the prompt's tokens too, after those that were stored already.

        `commit` follows when they are all there.
        """
        assert self._landing is None, "a landing writes this sequence's blocks"
        assert self._next_token == [self.kv_from_token] * self._store.geometry.num_layers
        self.num_tokens = self.shared_tokens
        self._may_append = True

    def commit(self) -> None:
        """Declare the prompt whole; from here on it may be attended to, and is shared.

        Raises:
            StreamTruncatedError: a layer is not whole.
            NonFiniteKvError: see `damage`.
        """
        assert self._landing is None, "a landing is open; `landed` says that it is whole"
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
            ours = self._slabs[ordinal]
            slab = self._store.publish(ours, key, previous, self._last_key)
            if slab is None:
                return
            self._keys.append(key)
            if slab != ours:
                self._slabs[ordinal] = slab
                self.slab_table[ordinal] = self._store.slab_address(slab)
                # Now, not before: `whole` must not find it here when it is another's.
                self._store.let_go(ours)

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
        self._close_landing()
        # `whole` must not find slabs here that are another's.
        slabs, self._slabs = self._slabs, []
        self._store.give_back(slabs, self._num_reserved, self._tail)
        self._num_reserved = 0

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


def _first_not_finite(geometry: KvGeometry, payload: bytes | memoryview, num_tokens: int) -> int:
    """Of a payload of which one token is not finite: how many tokens are before it."""
    bits = torch.from_numpy(np.frombuffer(payload, dtype=np.int16).copy())
    shape = (geometry.num_kv_heads, -1, 2, BLOCK_TOKENS, geometry.head_dim)
    kv = bits.view(torch.bfloat16).view(shape).transpose(1, 2).flatten(2, 3)
    token = reference.first_not_finite(kv[:, :, :num_tokens])
    assert token is not None, "the native check and torch disagree"
    return token
