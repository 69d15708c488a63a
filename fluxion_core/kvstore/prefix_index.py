"""An index of the text in slabs: full slabs by a chained hash, tails by their tokens.

A full slab's key is a hash of the key before it and of its own tokens, and so of its domain's root
and of all tokens up to its end. A root is a hash of the model and of the domain: who is in another
domain finds nothing, full slab or tail, and cannot tell what is stored. A tail is a slab filled in
part; it is found by the key before it and its tokens, and goes to one sequence at a time.

KV of tokens that did not attend to everything is an approximation, and so is all that follows it.
Its pieces are named by the approximation too, so that only sequences of the same one find them.

What was stored by a sequence that then failed is withdrawn, with all that is named after it: it was
computed from that, and would be found again with the next sequence of the same tokens.

Not here: who holds a slab (store.py), and locks: the store's is held by whoever calls what changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

TokenArray = NDArray[np.uint32]
"""Token ids, little-endian: their bytes are hashed."""


def token_array(token_ids: Sequence[int]) -> TokenArray:
    """Token ids as the index takes them."""
    return np.asarray(token_ids, dtype="<u4")


class TailName(NamedTuple):
    """The name by which a tail is found."""

    parent: bytes
    """Key of the slab before it, or the root of its domain."""
    approximation: str
    """Empty if all of its KV is exact."""
    tokens: bytes
    """Of this slab alone."""


@dataclass(frozen=True)
class NamedPrompt:
    """A prompt's tokens, and what KV of them would be found by. Made without a lock."""

    tokens: TokenArray
    root: bytes
    """Of its domain."""
    exact_keys: list[bytes]
    """Of its full slabs but for the last token's, if all their KV is exact."""


@dataclass(frozen=True)
class Prefix:
    """The stored beginning of a prompt."""

    slabs: list[int]
    keys: list[bytes]
    """Of those slabs that are full; one more is a tail."""
    tail: TailName | None
    num_tokens: int
    exact_tokens: int
    """First tokens whose KV is exact."""


class PrefixIndex:
    """Finds slabs by what they hold.

    Args:
        model_key: identifies the model.
        slab_tokens: of a full slab.
    """

    def __init__(self, model_key: bytes, slab_tokens: int) -> None:
        self._model = hashlib.blake2b(model_key, digest_size=16).digest()
        self._slab_tokens = slab_tokens
        self._published: dict[bytes, int] = {}
        self._parent_of: dict[bytes, bytes] = {}
        """Keys of full slabs that can be found, and the keys before them, or roots."""
        self._key_of: dict[int, bytes] = {}
        self._tails: dict[tuple[bytes, str], dict[bytes, int]] = {}
        self._tail_of: dict[int, TailName] = {}

    def __contains__(self, slab: int) -> bool:
        """Whether the slab can be found."""
        return slab in self._key_of or slab in self._tail_of

    def root_of(self, domain: str) -> bytes:
        """The key before the first of a domain; empty for the domain of all without one."""
        return hashlib.blake2b(self._model + domain.encode(), digest_size=16).digest()

    @staticmethod
    def key_after(parent: bytes, tokens: TokenArray, approximation: str) -> bytes:
        """Key of a full slab.

        Args:
            parent: key of the slab before it, or the root of its domain.
            tokens: of this slab.
            approximation: in its KV or before it; empty if all is exact.
        """
        text = tokens.tobytes() + approximation.encode()
        return hashlib.blake2b(parent + text, digest_size=16).digest()

    @staticmethod
    def tail_name(parent: bytes, tokens: TokenArray, approximation: str) -> TailName:
        """Name of a tail; arguments as in `key_after`."""
        return TailName(parent, approximation, tokens.tobytes())

    def name(self, token_ids: Sequence[int], domain: str) -> NamedPrompt:
        """A prompt with its names. Cost: about 55 ms for a million tokens."""
        tokens, root, size = token_array(token_ids), self.root_of(domain), self._slab_tokens
        keys: list[bytes] = []
        for end in range(size, len(tokens), size):
            keys.append(self.key_after(keys[-1] if keys else root, tokens[end - size : end], ""))
        return NamedPrompt(tokens, root, keys)

    def find(self, prompt: NamedPrompt, approximation: str) -> Prefix:
        """Find the stored beginning of a prompt: exact slabs, approximate ones, then a tail.

        Its last token is left out: it is always computed.

        Args:
            prompt: the text.
            approximation: that will do in the place of exact KV; empty for none.
        """
        size, root, exact_keys = self._slab_tokens, prompt.root, prompt.exact_keys
        tokens = prompt.tokens[:-1]
        slabs: list[int] = []
        keys: list[bytes] = []
        for key in exact_keys:
            if (slab := self._published.get(key)) is None:
                break
            keys.append(key)
            slabs.append(slab)
        exact_tokens = len(slabs) * size
        while approximation and len(slabs) < len(exact_keys):
            piece = tokens[len(slabs) * size : (len(slabs) + 1) * size]
            key = self.key_after(keys[-1] if keys else root, piece, approximation)
            if (slab := self._published.get(key)) is None:
                break
            keys.append(key)
            slabs.append(slab)
        num_tokens = len(slabs) * size
        parent = keys[-1] if keys else root
        tail = self._find_tail(parent, tokens[num_tokens : num_tokens + size], approximation)
        if tail is not None:
            in_tail = len(tail.tokens) // tokens.itemsize
            if not tail.approximation and exact_tokens == num_tokens:
                exact_tokens += in_tail
            num_tokens += in_tail
            slabs.append(self._tails[tail.parent, tail.approximation][tail.tokens])
        return Prefix(slabs, keys, tail, num_tokens, exact_tokens)

    def publish(self, slab: int, key: bytes, parent: bytes) -> int:
        """Make a full slab findable; returns the one that is found by its key from now on.

        Args:
            slab: that is full.
            key: of it.
            parent: key of the slab before it, or the root of its domain.
        """
        published = self._published.setdefault(key, slab)
        if published == slab:
            self._key_of[slab] = key
            self._parent_of[key] = parent
        return published

    def keep_tail(self, slab: int, name: TailName) -> int:
        """Make a tail findable; returns the one that is found by its name from now on."""
        tails = self._tails.setdefault((name.parent, name.approximation), {})
        kept = tails.setdefault(name.tokens, slab)
        if kept == slab:
            self._tail_of[slab] = name
        return kept

    def forget(self, slab: int) -> None:
        """Find this slab no more."""
        if (key := self._key_of.pop(slab, None)) is not None:
            del self._published[key], self._parent_of[key]
            return
        parent, approximation, tokens = self._tail_of.pop(slab)
        tails = self._tails[parent, approximation]
        del tails[tokens]
        if not tails:
            del self._tails[parent, approximation]

    def withdraw(self, slabs: Sequence[int]) -> list[int]:
        """Find no more these slabs, nor any that is named after one of them; returns all those.

        Cost: one pass over all names.
        """
        given = set(slabs)
        lost = {self._key_of[slab] for slab in given if slab in self._key_of}
        after: dict[bytes, list[bytes]] = {}
        for key, parent in self._parent_of.items():
            after.setdefault(parent, []).append(key)
        pending = list(lost)
        while pending:
            following = after.get(pending.pop(), [])
            lost.update(following)
            pending += following
        found = [self._published[key] for key in lost]
        found += [
            slab for slab, name in self._tail_of.items() if name.parent in lost or slab in given
        ]
        for slab in found:
            self.forget(slab)
        return found

    def _find_tail(self, parent: bytes, tokens: TokenArray, approximation: str) -> TailName | None:
        """The longest tail after `parent` that `tokens` begin with; an exact one if in doubt."""
        text = tokens.tobytes()
        fitting = [
            TailName(parent, tag, stored)
            for tag in dict.fromkeys(("", approximation))
            for stored in self._tails.get((parent, tag), ())
            if text.startswith(stored)
        ]
        return max(fitting, key=lambda name: len(name.tokens), default=None)
