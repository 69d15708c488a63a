"""The ways that KV can travel from a prefill node to a decode node, by the names settings have."""

from __future__ import annotations

from enum import StrEnum


class Carrier(StrEnum):
    """Something that CHUNK frames travel on. protos/README.md has the bytes of each."""

    SHARED_MEMORY = "shared_memory"
    """A ring of memory that both nodes have mapped; on one machine only."""
    SOCKETS = "sockets"
    """TCP connections beside the call."""
    GRPC = "grpc"
    """The call's own stream."""
