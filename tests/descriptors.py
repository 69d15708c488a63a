"""Descriptors of this process, each told from every other that has its number before or after.

A count of them all is no evidence of a leak: what an earlier test or gRPC has let go is closed
whenever it is collected, and a count falls by it.
"""

from __future__ import annotations

import os
from typing import TypeAlias

Descriptor: TypeAlias = tuple[int, str]


def open_descriptors() -> frozenset[Descriptor]:
    """Number and what it stands for: a socket by its inode, another by the file or its kind."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add((int(number), os.readlink(f"/proc/self/fd/{number}")))
        except FileNotFoundError:
            continue  # the listing's own
    return frozenset(found)


def opened_since(before: frozenset[Descriptor]) -> frozenset[Descriptor]:
    """What is open now and was not."""
    return open_descriptors() - before
