"""The own time of a prompt: what computing it takes while nothing else is computed.

Its operations, of which attention's grow with the square of its length, over a rate that follows
the chunks.
"""

from __future__ import annotations

from fluxion_core.models.config import ModelConfig

_KEPT_SHARE = 0.9
"""Of what was learnt, with each chunk: the last ten or so count."""


class OwnTime:
    """Estimates a prompt's own time from the times of chunks.

    Args:
        config: of the model.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._token_operations = 2 * config.matrix_weights
        self._attention_operations = config.attention_operations
        # Sums over chunks, not a mean of their rates: a small chunk says little.
        self._operations = 0.0
        self._seconds = 0.0

    def learn(self, first_token: int, num_tokens: int, seconds: float) -> None:
        """Learn from a chunk.

        Args:
            first_token: of the chunk, in its prompt.
            num_tokens: of the chunk.
            seconds: that it took.
        """
        operations = self._operations_of(first_token, num_tokens)
        self._operations = _KEPT_SHARE * self._operations + operations
        self._seconds = _KEPT_SHARE * self._seconds + seconds

    def seconds(self, num_tokens: int) -> float:
        """Seconds that a prompt of so many tokens takes; 0 before any chunk was computed."""
        if not self._operations:
            return 0.0
        return self._operations_of(0, num_tokens) * self._seconds / self._operations

    def _operations_of(self, first_token: int, num_tokens: int) -> float:
        before = first_token + num_tokens / 2
        return num_tokens * (self._token_operations + before * self._attention_operations)
