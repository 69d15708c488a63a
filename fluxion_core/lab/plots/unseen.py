"""Rules of reading on models that nothing was fitted to, as a picture: errors over bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxion_core.lab.plots.pictures import new_figure, twenty_colors


def draw_unseen(report: Mapping[str, Any], picture: Path) -> None:
    """Squared error over bytes, both relative to fixed(16, 5 %): a model beside the other.

    Args:
        report: as `fluxion_core.lab.unseen.assess` writes it.
        picture: PNG or SVG, by its suffix.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    models = report["figures"]
    figure = new_figure(6.2 * len(models), 5.6)
    names = list(dict.fromkeys(name for rules in models.values() for name in rules))
    colors = dict(zip(names, twenty_colors(), strict=False))
    for axes, (model, rules) in zip(
        figure.subplots(1, len(models), squeeze=False)[0], models.items(), strict=True
    ):
        texts = max(len(gain["of_texts"]) for gain in rules.values())
        for name, gain in rules.items():
            if len(gain["of_texts"]) < texts:
                # Of other texts than the others, which is no comparison.
                continue
            shares, squares = zip(*gain["line"], strict=True)
            axes.plot(shares, squares, "o-", markersize=3, label=name, color=colors[name])
        axes.plot(1, 1, "k*", markersize=12, label="fixed(16, 5 %)")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(0.1, 2)
        axes.set_ylim(0.05, 5)
        axes.set_title(f"{model}, {texts} {'text' if texts == 1 else 'texts'}")
        axes.set_xticks((0.1, 0.2, 0.5, 1, 2), ("0.1", "0.2", "0.5", "1", "2"))
        axes.xaxis.set_minor_formatter("")
        axes.set_xlabel("bytes / those of fixed(16, 5 %)")
        axes.set_ylabel("squared head output error / that of fixed(16, 5 %)")
        axes.grid(visible=True, which="both", alpha=0.25)
        axes.legend(fontsize="x-small")
    figure.savefig(picture, dpi=110)
