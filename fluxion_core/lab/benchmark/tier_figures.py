"""Figures of a tier: sizes of it, times of steps, and exact attention within as much."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from fluxion_core.errors import ConfigError

_SHARE = re.compile(r"([0-9.]+) ?(%|GiB)")


@dataclass(frozen=True)
class KvShare:
    """Device memory for KV: a share of all there is, or so much."""

    percent: float | None
    num_bytes: int = 0
    """If it is no share."""

    @classmethod
    def parse(cls, text: str) -> KvShare:
        """Read "20 %" or "8 GiB".

        Raises:
            ConfigError: it is neither.
        """
        match = _SHARE.fullmatch(text.strip())
        if match is None:
            raise ConfigError(f"KV in device memory {text!r}: a share as 20 %, or a size as 8 GiB")
        number = float(match[1])
        if match[2] == "%":
            return cls(number)
        return cls(None, int(number * 2**30))

    def of(self, kv_bytes: int) -> int:
        """Bytes, of a batch whose KV takes so many."""
        return self.num_bytes if self.percent is None else int(kv_bytes * self.percent / 100)

    def __str__(self) -> str:
        if self.percent is None:
            return f"{self.num_bytes / 2**30:g} GiB"
        return f"{self.percent:g} %"


@dataclass(frozen=True)
class TierStepFigure:
    """One policy with so much KV in device memory. Medians of steps; bytes are of a step."""

    lengths: tuple[int, ...]
    """Of the sequences."""
    policy: str
    is_recorded: bool
    """Its selections are; else real scores choose."""
    kv: str
    """Share or size of KV in device memory, as asked for."""
    device_kv_bytes: int
    """That KV may take there; not a step's."""
    held_bytes: int
    """That it takes there at the end; not a step's."""
    milliseconds: float
    gpu_milliseconds: float
    """From the graph's first kernel to its last."""
    idle_milliseconds: float
    """Of that, the GPU waited for the host and did nothing."""
    sampling_milliseconds: float
    """Of the step, on the CPU pool."""
    selected_bytes: float
    """K and V of regions that the step read."""
    region_bytes: float
    """K and V that exact reads."""
    missed_bytes: float
    """Of the selected ones, those in host memory alone: a mean."""
    filled_bytes: float
    """Copied into the tier: a mean."""
    evicted_bytes: float
    """Left it for others: a mean."""
    scanned_bytes: float
    """Digests, wherever they were."""
    counted_pcie_bytes: float
    """To the GPU, as counted here: a mean."""
    nvml_pcie_bytes: float
    """To the GPU, as the card counted: a mean; 0 where it does not."""
    dense_milliseconds: float
    """The dense step alone."""
    limit_milliseconds: float

    @property
    def hit_rate(self) -> float:
        """Share of the selected bytes that was resident."""
        return 1 - self.missed_bytes / self.selected_bytes if self.selected_bytes else 1.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all rows."""
        return len(self.lengths) / self.milliseconds * 1e3

    @property
    def batch_name(self) -> str:
        """Such as 4 x 131,072, or 131,072 + 32,768."""
        return batch_name(self.lengths)

    def as_json(self) -> dict[str, object]:
        """All that is known of it."""
        return asdict(self) | {
            "batch": self.batch_name,
            "hit_rate": self.hit_rate,
            "tokens_per_second": self.tokens_per_second,
        }

    def __str__(self) -> str:
        gigabytes = [
            f"{name} {number / 1e9:.3f}"
            for name, number in (
                ("selected", self.selected_bytes),
                ("missed", self.missed_bytes),
                ("filled", self.filled_bytes),
                ("PCIe", self.counted_pcie_bytes),
                ("card", self.nvml_pcie_bytes),
            )
        ]
        return (
            f"{self.batch_name:14s}  {self.policy:22s} {self.kv:>6s} "
            f"{self.held_bytes / 2**30:5.1f}/{self.device_kv_bytes / 2**30:4.1f} GiB "
            f"{self.milliseconds:8.2f} ms  GPU {self.gpu_milliseconds:7.2f}  "
            f"idle {self.idle_milliseconds:6.2f}  hits {self.hit_rate:.4f}  "
            f"{', '.join(gigabytes)} GB  limit {self.limit_milliseconds:.2f}"
        )


def batch_name(lengths: Sequence[int]) -> str:
    """Name of a batch, such as 4 x 131,072, or 131,072 + 32,768."""
    if len(set(lengths)) == 1:
        return f"{len(lengths)} x {lengths[0]:,}"
    return " + ".join(f"{length:,}" for length in lengths)


@dataclass(frozen=True)
class ExactRate:
    """Exact attention within so much device memory: sequences take turns in groups that fit."""

    lengths: tuple[int, ...]
    """Of all sequences."""
    kv: str
    groups: tuple[tuple[int, ...], ...]
    """Lengths of those that are there at a time; bringing them there and back is not counted."""
    milliseconds: float
    """One token of each sequence."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all sequences."""
        return len(self.lengths) / self.milliseconds * 1e3


def groups_that_fit(lengths: Sequence[int], tokens: int) -> list[tuple[int, ...]]:
    """Sequences in groups of so many tokens at most, the longest first into the first with room.

    A sequence that is longer than that is in no group.
    """
    groups: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        if length > tokens:
            continue
        room = [group for group in groups if sum(group) + length <= tokens]
        if room:
            room[0].append(length)
        else:
            groups.append([length])
    return [tuple(group) for group in groups]
