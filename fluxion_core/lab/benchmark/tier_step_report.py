"""Report of what `tier_step` measured: Markdown tables from its JSON files.

    python -m fluxion_core.lab.benchmark.tier_step_report FILE.json… --out tables.md

For each file and batch: exact attention with all KV in device memory, and every policy over the
memory that KV has there, with hit rates.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluxion_core.config.commands import Command, run_module

_COLUMNS = (
    "policy",
    "KV in HBM",
    "GiB, held / given",
    "ms",
    "tokens/s",
    "hits",
    "GB selected",
    "GB missed",
    "GB filled",
    "GPU ms",
    "of it idle ms",
    "sampling ms",
    "limit ms",
    "PCIe GB, counted / card",
)


@dataclass(frozen=True, kw_only=True)
class TierStepReport(Command):
    """Write tables of figures over the share of KV in device memory."""

    files: tuple[Path, ...] = field(kw_only=False)
    """JSON files of tier_step."""
    out: Path
    """Takes the tables."""

    def __call__(self) -> None:
        """Read all files, then write."""
        lines = ["# Decode steps with KV in device memory", ""]
        for file in self.files:
            lines += markdown(file.stem, json.loads(file.read_text()))
        self.out.write_text("\n".join(lines).rstrip() + "\n")


def markdown(name: str, report: dict[str, Any]) -> list[str]:
    """Lines of one run."""
    machine, options = report["machine"], report["options"]
    lines = [
        f"## {options['shape']}: {name}.json",
        "",
        f"{machine['gpu']}, {machine['processor']} ({machine['isa']}), Python {machine['python']}, "
        f"torch {machine['torch']}, commit {machine['commit']}.",
        f"Medians of {options['steps']} steps, bytes of a step.",
        f"Copies within HBM {report['copy_gigabytes_per_second'] / 1e3:.2f} TB/s, host read "
        f"{report['host_read_gigabytes_per_second']:.0f} GB/s, UVA "
        f"{report['uva_gigabytes_per_second']:.1f}.",
        f"Steps sample their rows: {report['sampling']}.",
        "",
        *_exact_lines(report),
    ]
    for batch in dict.fromkeys(figure["batch"] for figure in report["figures"]):
        figures = [figure for figure in report["figures"] if figure["batch"] == batch]
        lines += [
            f"### {batch}",
            "",
            f"The dense step alone: {figures[0]['dense_milliseconds']:.2f} ms. "
            f"Exact reads {figures[0]['region_bytes'] / 1e9:.2f} GB of regions.",
            "",
            *_table(_COLUMNS, [_row(figure) for figure in figures]),
            "",
        ]
    return lines


def _exact_lines(report: dict[str, Any]) -> list[str]:
    """Exact attention in device memory: its ways, and the rate within less of it."""
    if not report["exact"]:
        return []
    rows = [
        (
            f"{one['rows']} x {one['tokens']:,}",
            one["way"],
            f"{one['kv_bytes'] / 2**30:.1f}",
            f"{one['milliseconds']:.2f}",
            f"{one['rows'] / one['milliseconds'] * 1e3:.0f}",
            f"{one['limit_milliseconds']:.2f}",
        )
        for one in report["exact"]
    ]
    columns = ("exact in HBM", "way", "GiB of KV", "ms", "tokens/s", "limit ms")
    lines = [*_table(columns, rows), ""]
    lines += [
        f"- Exact within {one['kv']} of HBM:\n  {len(one['lengths'])} sequences in "
        f"{len(one['groups'])} groups that take turns: {one['milliseconds']:.2f} ms for a token of "
        f"each, {one['tokens_per_second']:.0f} tokens/s."
        for one in report["exact_rates"]
    ]
    return [*lines, ""] if report["exact_rates"] else lines


def _row(figure: dict[str, Any]) -> tuple[str, ...]:
    recorded = ", recorded" if figure["is_recorded"] else ""
    return (
        f"{figure['policy']}{recorded}",
        figure["kv"],
        f"{figure['held_bytes'] / 2**30:.1f} / {figure['device_kv_bytes'] / 2**30:.1f}",
        f"{figure['milliseconds']:.2f}",
        f"{figure['tokens_per_second']:.0f}",
        f"{figure['hit_rate']:.3f}",
        f"{figure['selected_bytes'] / 1e9:.2f}",
        f"{figure['missed_bytes'] / 1e9:.3f}",
        f"{figure['filled_bytes'] / 1e9:.3f}",
        f"{figure['gpu_milliseconds']:.2f}",
        f"{figure['idle_milliseconds']:.2f}",
        f"{figure['sampling_milliseconds']:.2f}",
        f"{figure['limit_milliseconds']:.2f}",
        f"{figure['counted_pcie_bytes'] / 1e9:.3f} / {figure['nvml_pcie_bytes'] / 1e9:.3f}",
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


if __name__ == "__main__":
    sys.exit(run_module(TierStepReport))
