"""A training run's report as a model card. Everything comes from `report.json`.

Its plots: lab/plots/training.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fluxion_core.planning.constants import NUM_FEATURES
from fluxion_core.planning.features import FEATURES, GROUPS


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
