"""Pictures: how each of this package is begun. Nothing outside the package imports matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluxion_core.config.extras import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty picture, in inches; `savefig` writes it as PNG or SVG, by the file's suffix.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("a picture", "matplotlib", "plots") from None
    return Figure(figsize=(width, height), layout="constrained")


def twenty_colors() -> list[tuple[float, float, float, float]]:
    """Colours of kinds that are told apart, red, green, blue and opacity, each up to 1."""
    from matplotlib import colormaps

    palette = colormaps["tab20"]
    return [palette(index) for index in range(palette.N)]
