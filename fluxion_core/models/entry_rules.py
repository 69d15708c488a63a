"""Entries of a model's files: each is read, known to change nothing, or refused by name.

A reader says which entries it reads, which are known to mean nothing to the computation, and which
may stand there with one of a few values only. What is in none of these tables is named in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fluxion_core.errors import UnsupportedModelError
from fluxion_core.observe.log import event

_log = logging.getLogger(__name__)
_NOTHING: tuple[object, ...] = (None, False, "", [], {})


@dataclass(frozen=True)
class Restriction:
    """The only values with which an entry is accepted, because others would change the answer."""

    values: tuple[object, ...]
    meaning: str
    """What other values would ask for."""


@dataclass(frozen=True)
class EntryRules:
    """Meaning of the entries of one kind of file."""

    read: frozenset[str]
    harmless: frozenset[str]
    """Describe training, storage or the file itself; answers are the same without them."""
    restricted: Mapping[str, Restriction] = field(default_factory=dict)

    def check(self, entries: Mapping[str, object], path: Path, *, prefix: str = "") -> None:
        """Look at every entry; the unknown ones that say something are named in the log.

        Args:
            entries: by name.
            path: of the file.
            prefix: of all names, before what the rules call them.

        Raises:
            UnsupportedModelError: an entry asks for something that is not implemented.
        """
        unknown = []
        for full_name, value in entries.items():
            name = full_name.removeprefix(prefix)
            if name in self.read or name in self.harmless:
                continue
            rule = self.restricted.get(name)
            if rule is not None:
                if not _is_one_of(value, (None, *rule.values)):
                    raise UnsupportedModelError(
                        f"{path}: {full_name} is {value!r:.60}: {rule.meaning} is not supported"
                    )
            elif not _is_one_of(value, _NOTHING):
                unknown.append(full_name)
        if unknown:
            names = ", ".join(sorted(unknown))
            _log.warning(
                event("model file has unknown entries, without effect", file=path, entries=names)
            )


def _is_one_of(value: object, allowed: tuple[object, ...]) -> bool:
    # By type too: True is no 1 here, but 1 is as good as 1.0.
    return any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed
    )
