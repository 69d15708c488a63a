"""A training run's report as pictures. Everything comes from `report.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxion_core.lab.plots.pictures import new_figure
from fluxion_core.planning.constants import BUDGETS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GRID_LABELS = ["0", *(f"1/{round(1 / budget)}" for budget in BUDGETS[1:]), "all"]


def write_plots(output: Path) -> list[Path]:
    """Draw `curve.png`, `assessment.png` and `losses.png` beside the report.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    report = json.loads((output / "report.json").read_text())
    paths = []
    figure = new_figure(11, 9)
    _draw_assessment(report["assessment"], figure.subplots(2, 2).flatten().tolist())
    paths.append(output / "assessment.png")
    figure.savefig(paths[-1], dpi=110)
    if "curve" in report:
        figure = new_figure(8, 6)
        _draw_curve(report["curve"], figure.subplots())
        paths.append(output / "curve.png")
        figure.savefig(paths[-1], dpi=110)
    if "losses" in report:
        figure = new_figure(12, 6)
        _draw_losses(report["losses"], *figure.subplots(1, 2))
        paths.append(output / "losses.png")
        figure.savefig(paths[-1], dpi=110)
    return paths


def _draw_curve(curve: dict[str, Any], axis: Axes) -> None:
    families: dict[str, list[tuple[float, float]]] = {}
    for figure in curve["figures"]:
        point = (figure["relative_bytes"], figure["mean_kl"])
        families.setdefault(figure["family"], []).append(point)
    for name, points in families.items():
        points.sort()
        style = "o" if name == "fixed" else "o--" if name.endswith("oracle") else "o-"
        axis.plot(*zip(*points, strict=True), style, label=name, markersize=4)
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="bytes read / those of fixed(16, 5 %)",
        ylabel="mean KL against exact attention, nats",
        title=f"{curve['steps']} steps of {len(curve['documents'])} unseen texts",
    )
    axis.grid(visible=True, which="both", alpha=0.3)
    axis.legend()


def _draw_assessment(assessment: dict[str, Any], axes: list[Axes]) -> None:
    part = assessment.get("longer") or next(iter(assessment.values()))
    histogram, confusion, layers, calibration = axes
    extent = (-4.0, 0.0, -4.0, 0.0)
    shares = [[value**0.4 for value in row] for row in part["histogram"]]
    histogram.imshow(shares, origin="lower", extent=extent, aspect="auto", cmap="Blues")
    histogram.plot([-4, 0], [-4, 0], color="black", linewidth=0.7)
    histogram.set(
        xlabel="predicted, log10", ylabel="true, log10", title="Head output error, nothing read"
    )
    labels = part["labels"][1]
    confusion.imshow(
        [[value**0.4 for value in row] for row in labels["confusion"]],
        origin="lower",
        aspect="auto",
        cmap="Blues",
    )
    ticks = range(len(_GRID_LABELS))
    confusion.set(
        xticks=ticks,
        yticks=ticks,
        xticklabels=_GRID_LABELS,
        yticklabels=_GRID_LABELS,
        xlabel="predicted",
        ylabel="needed",
        title=f"Budget at threshold {labels['threshold']:g}, block 16",
    )
    for threshold, (predicted, true) in part["streaming_by_layer"].items():
        line = layers.plot(predicted, label=f"predicted, {threshold}")[0]
        layers.plot(true, "--", color=line.get_color(), label=f"true, {threshold}")
    layers.set(xlabel="layer", ylabel="share of streaming heads", title="Streaming heads")
    layers.legend()
    for index, pairs in part["calibration"].items():
        budget = _GRID_LABELS[int(index)]
        calibration.plot(*zip(*pairs, strict=True), "o-", markersize=3, label=f"budget {budget}")
    calibration.axline((1e-4, 1e-4), slope=1, color="black", linewidth=0.7)
    calibration.set(
        xscale="log",
        yscale="log",
        xlabel="predicted mean squared error",
        ylabel="observed",
        title="Calibration",
    )
    calibration.legend()


def _draw_losses(losses: dict[str, Any], heads: Axes, kinds: Axes) -> None:
    by_head = losses["by_head"]
    limit = max(abs(value) for row in by_head for value in row)
    image = heads.imshow(by_head, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit)
    heads.set(xlabel="head", ylabel="layer", title="Share of weighted squared error beyond oracle")
    heads.figure.colorbar(image, ax=heads)
    names = [f"{kind['name']} ({kind['share']:.0%})" for kind in losses["kinds"]]
    places = list(range(len(names)))
    for offset, key, label in ((0.2, "predicted_kl", "predicted"), (-0.2, "oracle_kl", "oracle")):
        values = [kind[key] for kind in losses["kinds"]]
        kinds.barh([place + offset for place in places], values, height=0.4, label=label)
    kinds.set(
        yticks=places,
        yticklabels=names,
        xlabel="mean KL, nats",
        title=f"{losses['predicted']} and {losses['oracle']}",
    )
    kinds.legend()
