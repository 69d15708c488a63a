"""Provenance of a result: the model, its weights, the machine and the commit.

Every result file says it, as `about`; a file of a tree with changes that were not committed says so
in its commit, and is none to publish (tests/fluxion_core/lab/test_results.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from fluxion_core.lab.machine import describe_machine

NONE = "none"
"""In place of a model, a revision or weights that had no part in it."""

_COMMIT = re.compile(r"[0-9a-f]{7,40}")


@dataclass(frozen=True)
class Provenance:
    """Circumstances with which a figure must be read."""

    model: str
    """Name; of a shape with random weights, the shape's."""
    revision: str
    """Hash of the model's files."""
    weights: str
    """PlannerWeights.fingerprint."""
    machine: str
    commit: str

    @classmethod
    def here(
        cls,
        model: str = NONE,
        revision: str = NONE,
        weights: str = NONE,
        *,
        commit: str = "",
        gpu: str = "",
    ) -> Provenance:
        """Provenance of this machine and this code.

        Args:
            model, revision, weights: see the fields.
            commit: where the code does not lie in a repository; found out if empty.
            gpu: its name, if one had a part in it.
        """
        machine = describe_machine(commit)
        of_code = machine.pop("commit")
        if gpu:
            machine["gpu"] = gpu
        described = ", ".join(f"{name} {value}" for name, value in machine.items())
        return cls(model, revision, weights or NONE, described, of_code)

    @classmethod
    def of_shape(cls, shape: str, *, gpu: str = "") -> Provenance:
        """Provenance of a model's shape with random weights, here."""
        return cls.here(f"{shape}, random weights", gpu=gpu)

    def as_json(self) -> dict[str, str]:
        """The entry `about` of a result file."""
        return asdict(self)


def faults_of(about: object) -> list[str]:
    """Faults of a result file's `about`; none of one that can be published.

    A result from before this was asked for says of what nobody knows any more: "unknown", and why.
    """
    if not isinstance(about, Mapping):
        return ["no `about`"]
    names = Provenance.__dataclass_fields__
    faults = [f"{name} is not said" for name in names if not about.get(name)]
    commit = str(about.get("commit", ""))
    if not (_COMMIT.fullmatch(commit) or commit.startswith("unknown: ")):
        faults.append(f"commit {commit!r} is none, or of a tree with changes")
    return faults
