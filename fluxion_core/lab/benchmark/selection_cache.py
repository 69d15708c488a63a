"""Hit rates of a cache of hot units, simulated on recorded selections: policies side by side.

    python -m fluxion_core.lab.benchmark.selection_cache FILE.npz… --json out.json

One pool holds a share of the region's units of all layers and heads. A step asks for the units it
misses; a fill brings them, or as many of the first layers' as it takes, and the next step that may
ask is the one after the fill has ended. What leaves is chosen when a fill begins:

    lru       what was selected longest ago
    lru-old   likewise, but nothing that this step selected: what has no place then is not brought;
              the tier's own
    lfu       the lowest count, which decays by 3 % a step; newcomers begin with 1
    lfu-all   likewise, but counts of all units are kept, and a unit stays out if its count is lower
    clock     the next unit from the hand on that was not selected since the hand's last turn

Nothing is there before the first step; the first steps are not counted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from fluxion_core.config.command_options import JsonOption, Numbers, Texts
from fluxion_core.config.commands import Command, run_module, within
from fluxion_core.errors import ConfigError
from fluxion_core.lab.benchmark.recorded_selections import RecordedSelections
from fluxion_core.lab.provenance import Provenance

Units = npt.NDArray[np.int64]

DECAY = 0.97
"""Of counts, a step."""

POLICIES = ("lru", "lru-old", "lfu", "lfu-all", "clock")


class SimulatedCache:
    """A pool of units, and who leaves it.

    Args:
        policy: one of POLICIES.
        num_units: that there are.
        capacity: units that it holds.
        fill_steps: during which a fill runs and nothing is asked for; 0: what a step misses is
            there for the next one.
        fill_units: that one fill brings at most.
    """

    def __init__(
        self,
        policy: str,
        num_units: int,
        capacity: int,
        fill_steps: int,
        fill_units: int | None = None,
    ) -> None:
        if policy not in POLICIES:
            raise ConfigError(f"cache policy {policy!r}; one of {', '.join(POLICIES)}")
        self._policy, self._capacity, self._fill_steps = policy, capacity, fill_steps
        self._fill_units = min(capacity, fill_units or capacity)
        self._is_held = np.zeros(num_units, np.bool_)
        self._stamps = np.full(num_units, -1, np.int64)
        self._counts = np.zeros(num_units)
        self._is_marked = np.zeros(num_units, np.bool_)
        self._ring = np.full(capacity, -1, np.int64)
        self._hand = 0
        self._step = 0
        self._filling: Units | None = None
        self._left = 0
        self.num_filled = 0
        """Units brought so far."""

    @property
    def held(self) -> Units:
        """Units that are there."""
        return np.flatnonzero(self._is_held)

    def select(self, units: Units) -> int:
        """Take one step; how many of the units it selects are there.

        Args:
            units: that are selected, each once.
        """
        self._end_fill()
        is_hit = self._is_held[units]
        self._step += 1
        self._counts *= DECAY
        counted = units if self._policy == "lfu-all" else units[is_hit]
        self._counts[counted] += 1
        self._stamps[units] = self._step
        self._is_marked[units] = True
        if self._filling is None:
            self._begin_fill(units[~is_hit])
        return int(is_hit.sum())

    def _begin_fill(self, missing: Units) -> None:
        wanted = missing[: self._fill_units]
        free = self._capacity - int(self._is_held.sum())
        if self._policy == "lru-old":
            wanted = wanted[: free + int((self._stamps[self.held] < self._step).sum())]
        excess = len(wanted) - free
        if excess > 0:
            if self._policy == "lfu-all":
                wanted, leaving = self._by_count(wanted)
            else:
                leaving = self._leaving(excess)
            self._is_held[leaving] = False
            self._ring[np.isin(self._ring, leaving)] = -1
        self._filling, self._left = wanted, self._fill_steps

    def _end_fill(self) -> None:
        if self._filling is None:
            return
        if self._left > 0:
            self._left -= 1
            return
        units, self._filling = self._filling, None
        self._is_held[units] = True
        if self._policy == "lfu":
            self._counts[units] = 1
        # The hand is behind what it let go, so that newcomers get a whole turn.
        self._ring[np.flatnonzero(self._ring < 0)[: len(units)]] = units
        self.num_filled += len(units)

    def _leaving(self, number: int) -> Units:
        if self._policy == "clock":
            return self._from_hand(number)
        held = self.held
        rank = self._counts if self._policy == "lfu" else self._stamps
        return held[np.argpartition(rank[held], number - 1)[:number]]

    def _by_count(self, wanted: Units) -> tuple[Units, Units]:
        """Who comes and who leaves, so that the highest counts are there."""
        both = np.concatenate([self.held, wanted])
        order = np.argsort(-self._counts[both], kind="stable")
        out = both[order[self._capacity :]]
        return wanted[~np.isin(wanted, out)], out[self._is_held[out]]

    def _from_hand(self, number: int) -> Units:
        leaving: list[int] = []
        while len(leaving) < number:
            unit = self._ring[self._hand]
            if unit >= 0 and self._is_held[unit]:
                if self._is_marked[unit]:
                    self._is_marked[unit] = False
                else:
                    leaving.append(unit)
                    self._is_held[unit] = False
            self._hand = (self._hand + 1) % self._capacity
        return np.array(leaving, np.int64)


@dataclass(frozen=True)
class CacheFigure:
    """One text under one policy with one cache. Shares are of the units selected."""

    selection: str
    """Policy of the heads."""
    text: str
    cache: str
    """One of POLICIES."""
    fill_steps: int
    fill_permille: int
    """Units of a fill at most, of the region's; 0: no limit."""
    capacity: float
    """Share of the region's units."""
    selected: float
    """Share of the region's units that a step reads."""
    hits: float
    """From the first counted step on."""
    hits_before_change: float
    """Up to the change of topic; all, if there is none."""
    hits_at_change: float
    """In the 16 steps from it on; of the last 16, if there is none."""
    fills: float
    """Units brought, of those selected."""


def selected_units(recorded: RecordedSelections, text: int) -> list[Units]:
    """Units of all groups that any head reads, numbered throughout, for each step."""
    steps = []
    for step in range(recorded.num_steps):
        union = recorded.units(text, step).any(axis=2)
        steps.append(np.flatnonzero(union.reshape(-1)))
    return steps


def simulate(
    recorded: RecordedSelections,
    text: int,
    steps: Sequence[Units],
    *,
    cache: str,
    fill_steps: int,
    fill_permille: int,
    capacity: float,
    warm_up: int,
) -> CacheFigure:
    """Replay one text through one cache."""
    _, _, layers, kv_heads, _, num_bytes = recorded.bits.shape
    begin, end = recorded.regions[text, -1]
    in_region = layers * kv_heads * int(end - begin)
    pool = SimulatedCache(
        cache,
        layers * kv_heads * num_bytes * 8,
        round(capacity * in_region),
        fill_steps,
        fill_permille * in_region // 1000 or None,
    )
    hits = np.zeros(len(steps))
    sizes = np.array([len(units) for units in steps])
    for number, units in enumerate(steps):
        if number == warm_up:
            filled = pool.num_filled
        hits[number] = pool.select(units)
    change = recorded.changes[text]
    at = change if change >= 0 else len(steps) - 16

    def share(first: int, last: int) -> float:
        return float(hits[first:last].sum() / max(1, sizes[first:last].sum()))

    return CacheFigure(
        selection=recorded.policy,
        text=recorded.texts[text],
        cache=cache,
        fill_steps=fill_steps,
        fill_permille=fill_permille,
        capacity=capacity,
        selected=float(sizes.mean() / in_region),
        hits=share(warm_up, len(steps)),
        hits_before_change=share(warm_up, change if change >= 0 else len(steps)),
        hits_at_change=share(at, at + 16),
        fills=float((pool.num_filled - filled) / max(1, sizes[warm_up:].sum())),
    )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SelectionCacheOptions:
    """Caches to simulate."""

    percents: Numbers = (5, 10, 20, 40)
    """Capacities, in percent of the region's units."""
    caches: Texts = POLICIES
    """Who leaves: lru, lru-old, lfu, lfu-all, clock."""
    fill_steps: Numbers = (0, 1, 2)
    """Steps during which a fill runs."""
    fill_permilles: Numbers = (0,)
    """Units of a fill at most, in thousandths of the region's; 0: no limit. A batch of 256 MiB is 4
    of 4 x 128K of Llama-3.1-8B."""
    warm_up: Annotated[int, within(1)] = 32
    """First steps of a text, which are not counted."""


@dataclass(frozen=True, kw_only=True)
class SelectionCacheBench(JsonOption, Command):
    """Simulate caches of hot units on recorded selections."""

    files: tuple[Path, ...] = field(kw_only=False)
    """Recorded selections."""
    options: SelectionCacheOptions = field(default_factory=SelectionCacheOptions)
    """What is simulated."""

    def __call__(self) -> None:
        """Print a table; keep the figures."""
        console, options = self.console(width=160), self.options
        figures = []
        abouts = []
        for file in self.files:
            recorded = RecordedSelections.load(file)
            abouts.append(recorded.about)
            for text in range(len(recorded.texts)):
                steps = selected_units(recorded, text)
                figures += [
                    simulate(
                        recorded,
                        text,
                        steps,
                        cache=cache,
                        fill_steps=fill_steps,
                        fill_permille=fill_permille,
                        capacity=percent / 100,
                        warm_up=options.warm_up,
                    )
                    for cache in options.caches
                    for fill_steps in options.fill_steps
                    for fill_permille in options.fill_permilles
                    for percent in options.percents
                ]
        _print(figures, options, console)
        about = Provenance.here(*(abouts[0][name] for name in ("model", "revision", "weights")))
        self.write(
            {
                "about": about.as_json(),
                "recorded": abouts,
                "options": asdict(options),
                "figures": [asdict(figure) for figure in figures],
            }
        )


def _print(
    figures: Sequence[CacheFigure], options: SelectionCacheOptions, console: Console
) -> None:
    """A row for each text, cache and length of fills: hits, at the change, and fills."""
    table = Table(box=None, pad_edge=False)
    for column in ("heads read by", "text", "selected", "cache", "fill steps", "of"):
        table.add_column(column)
    for percent in options.percents:
        table.add_column(f"{percent} %: hits / at change / fills")
    rows: dict[tuple[str, ...], list[str]] = {}
    for one in figures:
        selected, fill_steps = f"{one.selected:.3f}", str(one.fill_steps)
        key: tuple[str, ...] = (
            one.selection,
            one.text,
            selected,
            one.cache,
            fill_steps,
            str(one.fill_permille),
        )
        rows.setdefault(key, []).append(
            f"{one.hits:.3f} / {one.hits_at_change:.3f} / {one.fills:.3f}"
        )
    for key, cells in rows.items():
        table.add_row(*key, *cells)
    console.print(table)


if __name__ == "__main__":
    sys.exit(run_module(SelectionCacheBench))
