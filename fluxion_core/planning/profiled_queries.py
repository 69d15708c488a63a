"""Queries of a prompt that its profile is made from: which they are, and those kept so far.

The prompt's last ones, which the network's features come from; and some that are spread over what
is before them, in even steps. What a head needs changes from token to token, so that plans which
are made once, for all that follows, come from both together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxion_core.geometry import ceil_div

PROFILED_QUERIES = 16
"""Last queries of the prompt that a head's needs are estimated from."""

SPREAD_QUERIES = 32
"""Further ones that are spread over SPREAD_TOKENS."""

SPREAD_TOKENS = 1024
"""Tokens before the last queries."""

_SPREAD_STEP = SPREAD_TOKENS // SPREAD_QUERIES


@dataclass(frozen=True)
class ProfiledPositions:
    """Positions of the queries that a prompt's profile is made from, in ascending order."""

    spread: range
    """Before the last ones."""
    last: range
    """The prompt's last ones."""

    @staticmethod
    def of(num_tokens: int, first_token: int = 0) -> ProfiledPositions:
        """Positions of a prompt of which only the tokens from one on are computed.

        The last ones are up to 16. Before them every 32nd token is one, for 1,024 tokens; in a
        short prompt for half of it, since earlier queries have another region.

        Args:
            num_tokens: of the prompt.
            first_token: before it there are no queries: its KV was stored already.
        """
        last = range(max(first_token, num_tokens - PROFILED_QUERIES, 0), num_tokens)
        end = num_tokens - PROFILED_QUERIES
        first = max(first_token, end - SPREAD_TOKENS, num_tokens // 2)
        count = max(0, end - first) // _SPREAD_STEP
        return ProfiledPositions(range(end - count * _SPREAD_STEP, end, _SPREAD_STEP), last)

    def __len__(self) -> int:
        return len(self.spread) + len(self.last)

    def __iter__(self) -> Iterator[int]:
        yield from self.spread
        yield from self.last

    def pick(self, query: Tensor, first_token: int) -> Tensor:
        """A copy of what is profiled of a chunk's queries; may have no rows.

        Args:
            query: [tokens, heads, head_dim]; of the tokens from `first_token` on.
            first_token: of the chunk.
        """
        both = (self.spread, self.last)
        return torch.cat([query[_rows(part, first_token, len(query))] for part in both])


def _rows(positions: range, first_token: int, num_tokens: int) -> slice:
    skipped = ceil_div(max(0, first_token - positions.start), positions.step)
    begin = positions.start + skipped * positions.step - first_token
    end = min(positions.stop - first_token, num_tokens)
    return slice(begin, max(begin, end), positions.step)


class KeptQueries:
    """Profiled queries of a prompt, kept while its chunks pass.

    Args:
        num_tokens: of the prompt.
        num_layers: of the model.
        first_token: the first one that is computed.

    Holds up to 48 * layers * heads * head_dim numbers, as they are added.
    """

    def __init__(self, num_tokens: int, num_layers: int, first_token: int = 0) -> None:
        self.positions = ProfiledPositions.of(num_tokens, first_token)
        self._kept: list[list[Tensor]] = [[] for _ in range(num_layers)]

    def add(self, layer: int, picked: Tensor) -> None:
        """Keep what `ProfiledPositions.pick` gave of the next chunk."""
        if len(picked):
            self._kept[layer].append(picked)

    def take(self, layer: int) -> Tensor:
        """[len(positions), heads, head_dim] float32 of a layer, which is not kept any longer."""
        kept, self._kept[layer] = self._kept[layer], []
        return torch.cat(kept).float()
