"""Domains of stored KV: the requests of one go on from each other's KV, and no others do.

A domain is a client, known by its token or certificate, and a salt that its request may carry.
"""

from __future__ import annotations

from typing import Literal

Sharing = Literal["client", "all"]
"""Among whose requests prefixes are shared; see StoreSettings.share_prefixes."""


def cache_domain(sharing: Sharing, caller: str, salt: str) -> str:
    """Name of a request's domain; no two pairs of caller and salt have the same.

    Args:
        sharing: whether the caller matters.
        caller: who it is known to be; empty if nobody knows.
        salt: of the request; empty for none.
    """
    owner = caller if sharing == "client" else ""
    return f"{len(owner)} {owner} {salt}" if owner or salt else ""
