"""A training run's report as a model card and as plots. Everything comes from `report.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxion_core import DISTRIBUTION
from fluxion_core.errors import ConfigError
from fluxion_core.planning.constants import BUDGETS, NUM_FEATURES
from fluxion_core.planning.features import FEATURES, GROUPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GRID_LABELS = ["0", *(f"1/{round(1 / budget)}" for budget in BUDGETS[1:]), "all"]


def write_card(output: Path) -> Path:
    """Write `card.md` beside the report."""
    report = json.loads((output / "report.json").read_text())
    path = output / "card.md"
    path.write_text("\n".join(_card(report)) + "\n")
    return path


def _card(report: dict[str, Any]) -> list[str]:
    lines = [
        f"# Head predictor of {report['model']}",
        "",
        f"One MLP of {report['parameters']:,} parameters for all layers and heads: "
        f"{NUM_FEATURES} features in, a head's error curve out. Trained on "
        f"{report['head_steps']:,} head-steps of {report['shards']} texts, prompts of up to 4,096 "
        "tokens; tested on other documents.",
        *_label_lines(report["assessment"]),
    ]
    if "ablation" in report:
        lines += _ablation_lines(report["ablation"])
    if "curve" in report:
        lines += _curve_lines(report["curve"])
    if "losses" in report:
        lines += _loss_lines(report["losses"])
    return lines


def _label_lines(assessment: dict[str, Any]) -> list[str]:
    return [
        "",
        "## Labels on unseen documents",
        "",
        "| prompts | threshold | streaming, true / predicted | class right | missed retrieval "
        "| budget within one step | enough |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {name} | {row['threshold']:g} | {row['streaming_true']:.3f} / "
            f"{row['streaming_predicted']:.3f} | {row['class_accuracy']:.3f} | "
            f"{row['missed_retrieval']:.3f} | {row['budget_within_one']:.3f} | "
            f"{row['budget_enough']:.3f} |"
            for name, part in assessment.items()
            for row in part["labels"]
        ),
    ]


def _ablation_lines(ablation: dict[str, Any]) -> list[str]:
    lines = ["", "## Without a group of features", ""]
    lines += ["| group | features | validation loss | test loss |", "|---|---|---|---|"]
    for group in ("none", *GROUPS):
        row = ablation[group]
        count = sum(feature.group == group for feature in FEATURES)
        lines.append(
            f"| {group} | {count} | {row['validation']['weighted_deviance']:.3f} | "
            f"{row['test']['weighted_deviance']:.3f} |"
        )
    return lines


def _curve_lines(curve: dict[str, Any]) -> list[str]:
    return [
        "",
        f"## What a byte buys: {curve['steps']} steps, {len(curve['documents'])} unseen texts",
        "",
        "Bytes relative to fixed(16, 5 %), all scans counted; KL in nats against exact.",
        "",
        "| way | bytes | KL (standard error) | same token | streaming heads |",
        "|---|---|---|---|---|",
        *(
            f"| {f['way']} | {f['relative_bytes']:.3f} | {f['mean_kl']:.4f} "
            f"({f['kl_standard_error']:.4f}) | {f['same_token']:.3f} | {f['streaming']:.2f} |"
            for f in curve["figures"]
        ),
        "",
        "| decisions | bytes at the KL of fixed(16, 5 %), 95 % interval |",
        "|---|---|",
        *(
            f"| {name} | {value:.3f} ({low:.3f} to {high:.3f}) |"
            for name, (value, low, high) in curve["bytes_at_reference_kl"].items()
        ),
    ]


def _loss_lines(losses: dict[str, Any]) -> list[str]:
    return [
        "",
        f"## Where {losses['predicted']} loses against {losses['oracle']}",
        "",
        f"The worst twentieth of the steps make {losses['worst_steps_share']:.0%} of the KL.",
        "",
        "| steps | share | KL, predicted / oracle | share of the loss |",
        "|---|---|---|---|",
        *(
            f"| {kind['name']} | {kind['share']:.2f} | {kind['predicted_kl']:.4f} / "
            f"{kind['oracle_kl']:.4f} | {kind['share_of_loss']:.2f} |"
            for kind in losses["kinds"]
        ),
    ]


def write_plots(output: Path) -> list[Path]:
    """Draw `curve.png`, `assessment.png` and `losses.png` beside the report.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise ConfigError(f"plots need matplotlib: pip install '{DISTRIBUTION}[plots]'") from None
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    report = json.loads((output / "report.json").read_text())
    paths = []
    figure, axes = plt.subplots(2, 2, figsize=(11, 9), layout="constrained")
    _draw_assessment(report["assessment"], axes.flatten().tolist())
    paths.append(output / "assessment.png")
    figure.savefig(paths[-1], dpi=110)
    if "curve" in report:
        figure, axis = plt.subplots(figsize=(8, 6), layout="constrained")
        _draw_curve(report["curve"], axis)
        paths.append(output / "curve.png")
        figure.savefig(paths[-1], dpi=110)
    if "losses" in report:
        figure, pair = plt.subplots(1, 2, figsize=(12, 6), layout="constrained")
        _draw_losses(report["losses"], pair[0], pair[1])
        paths.append(output / "losses.png")
        figure.savefig(paths[-1], dpi=110)
    plt.close("all")
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
