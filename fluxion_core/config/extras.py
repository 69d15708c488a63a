"""Packages that only some need: which extra of ours brings each.

They are imported where the thing is asked for that needs them, and nowhere else.
"""

from __future__ import annotations

from fluxion_core import DISTRIBUTION
from fluxion_core.errors import ConfigError


class MissingExtraError(ConfigError):
    """A package that is needed is not installed; the text says how to get it."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        self.package, self.extra = package, extra
        super().__init__(f"{what} needs {package}: pip install '{DISTRIBUTION}[{extra}]'")
