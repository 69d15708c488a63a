"""Report of what `gpu_step` measured: Markdown tables and a picture from its JSON files.

    python -m fluxion_core.lab.benchmark.gpu_step_report FILE.json… --folder DIRECTORY

Writes tables.md and, for each file, a PNG of its name: step times of every batch, policy and lane,
with their limits.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluxion_core.config.commands import Command, run_module
from fluxion_core.lab.plots.gpu_step import NOT_A_POLICY, draw_steps

BASELINE = "fixed(16, 5 %)"


@dataclass(frozen=True, kw_only=True)
class GpuStepReport(Command):
    """Write tables.md, and a picture of each file."""

    files: tuple[Path, ...] = field(kw_only=False)
    """JSON files of gpu_step."""
    folder: Path
    """Takes what is written; must be there."""

    def __call__(self) -> None:
        """Read all files, then write."""
        reports = [(file.stem, json.loads(file.read_text())) for file in self.files]
        lines = ["# Decode steps on a GPU machine", ""]
        for name, report in reports:
            lines += markdown(name, report)
            draw_steps(report, self.folder / f"{name}.png")
        (self.folder / "tables.md").write_text("\n".join(lines).rstrip() + "\n")


def markdown(name: str, report: dict[str, Any]) -> list[str]:
    """Lines of one run."""
    machine, options = report["machine"], report["options"]
    rates = {
        name: report[f"{name}_gigabytes_per_second"]
        for name in ("host_read", "uva", "host_read_beside_uva", "uva_beside_host_read")
    }
    columns = (
        "batch",
        "policy",
        "lanes",
        "ms",
        "sampling ms",
        "GPU idle ms",
        "GB read",
        "of it by the GPU",
        "limit ms",
        "over it",
        "over it, rates at the same time",
        "PCIe GB, counted / card",
    )
    together = rates["host_read_beside_uva"] + rates["uva_beside_host_read"]
    lines = [
        f"## {options['shape']}: {name}.json",
        "",
        f"{machine['gpu']}, {machine['processor']} ({machine['isa']}), Python {machine['python']}, "
        f"torch {machine['torch']}, commit {machine['commit']}; medians of {options['steps']} "
        f"steps. Host read {rates['host_read']:.0f} GB/s, UVA {rates['uva']:.1f}; at the same time "
        f"{rates['host_read_beside_uva']:.0f} and {rates['uva_beside_host_read']:.1f}. "
        f"Steps sample their rows: {report.get('sampling', 'no')}.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
    ]
    for figure in report["figures"]:
        lines.append(
            f"| {figure['batch']} | {figure['policy']} | {figure['lanes']} | "
            f"{figure['milliseconds']:.1f} | {_sampling(figure)} | "
            f"{figure['idle_milliseconds']:.1f} | "
            f"{figure['read_bytes'] / 1e9:.2f} | {figure['lane_bytes'] / 1e9:.2f} | "
            f"{figure['limit_milliseconds']:.1f} | {figure['over_limit']:.2f} | "
            f"{figure['milliseconds'] / _limit(figure, together):.2f} | "
            f"{figure['counted_pcie_bytes'] / 1e9:.2f} / {figure['nvml_pcie_bytes'] / 1e9:.2f} |"
        )
    lines += ["", *_claims(report["figures"]), "", f"![{name}]({name}.png)", ""]
    return lines


def _sampling(figure: dict[str, Any]) -> str:
    """Milliseconds of sampling, of runs whose steps did."""
    milliseconds = figure.get("sampling_milliseconds")
    return "" if milliseconds is None else f"{milliseconds:.2f}"


def _limit(figure: dict[str, Any], gigabytes_per_second: float) -> float:
    """Milliseconds: the dense step alone, and what was read at this rate."""
    read = figure["read_bytes"] / gigabytes_per_second / 1e6
    return float(figure["dense_milliseconds"] + read)


def _claims(figures: Sequence[dict[str, Any]]) -> list[str]:
    """How many times faster than what, batch by batch."""
    lines = []
    for batch in dict.fromkeys(figure["batch"] for figure in figures):
        ms = {
            (figure["policy"], figure["lanes"]): figure["milliseconds"]
            for figure in figures
            if figure["batch"] == batch
        }
        dense = next(f["dense_milliseconds"] for f in figures if f["batch"] == batch)
        parts = []
        if (NOT_A_POLICY[0], "both") in ms:
            streaming = ms[NOT_A_POLICY[0], "both"]
            on_gpu = next(
                f["gpu_milliseconds"]
                for f in figures
                if f["batch"] == batch and f["policy"] == NOT_A_POLICY[0]
            )
            parts.append(
                f"streaming {streaming / dense:.2f} of the dense step alone ({dense:.2f} ms), "
                f"{on_gpu / dense:.2f} from its first kernel to its last"
            )
        baseline = ms.get((BASELINE, "both"))
        alone = [ms[BASELINE, lane] for lane in ("cpu", "gpu") if (BASELINE, lane) in ms]
        if baseline and alone:
            parts.append(
                f"{BASELINE} {min(alone) / baseline:.2f} times faster than the better device"
            )
        for (policy, lane), value in ms.items():
            if baseline and lane == "both" and policy not in (BASELINE, *NOT_A_POLICY):
                parts.append(f"{policy} {baseline / value:.2f} times faster than {BASELINE}")
        lines.append(f"- {batch}: {'; '.join(parts)}.")
    return lines


if __name__ == "__main__":
    sys.exit(run_module(GpuStepReport))
