"""The one thing a model asks of the system around it: attention.

Prefill puts KV capture behind it, decode puts hybrid attention behind it. Models know neither.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class AttentionPort(Protocol):
    """Records keys and values of new tokens, and attends over all that came before them too.

    Called once per layer, in layer order, for the same tokens. Which sequence a token belongs to,
    and where earlier KV lies, is the port's business.
    """

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of the new tokens of one layer.

        Args:
            layer: 0 to num_layers - 1.
            query: [tokens, heads, head_dim], rotary applied, not scaled; the model's dtype.
            key: [tokens, kv_heads, head_dim], rotary applied.
            value: like key.

        Returns:
            [tokens, heads, head_dim], dtype and device of the query.
        """
        ...
