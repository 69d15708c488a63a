"""What the console pages draw: their own script, run without a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import quickjs

DEPLOY = Path(__file__).parents[2] / "deploy"
SCRIPT = (DEPLOY / "grafana" / "console.js").read_text()
RANGE = {"start": 1000, "end": 1040, "step": 10}
TIMES = (1000, 1010, 1020, 1030, 1040)
FLOOR, CEILING = 142.0, 8.0
"""Where 0 and the axis' top lie, in pixels from above."""


class Page:
    """Calls functions of the script with values and gives their values back."""

    def __init__(self) -> None:
        self._context = quickjs.Context()
        self._context.eval(SCRIPT)

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            given = ", ".join(map(json.dumps, arguments))
            return json.loads(self._context.eval(f"JSON.stringify({name}({given}))"))

        return call


@pytest.fixture(scope="module")
def page() -> Page:
    return Page()


def series(legend: str, *values: float | None, is_drawn: bool = True) -> dict[str, Any]:
    """One value at each time; None where there is none."""
    points = [[time, value] for time, value in zip(TIMES, values, strict=True) if value is not None]
    return {"legend": legend, "isDrawn": is_drawn, "points": points}


def draw(page: Page, *all_series: dict[str, Any], unit: str = "percentunit", stacked: bool = False):
    panel = {"unit": unit, "stacked": stacked}
    return page.draw(panel, all_series, RANGE, 600, "No GPU here.")


def heights(svg: str, kind: str) -> list[list[float]]:
    """The y of each point of every path of a kind."""
    paths = re.findall(rf'<path class="{kind}" d="([^"]*)"', svg)
    return [[float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)] for path in paths]


def test_a_stacked_panel_is_filled_and_each_band_is_as_high_as_its_value(page):
    # By hand: 0.3, 0.5 and 0.2 of an axis that ends at 1: bands from 0 to 0.3, to 0.8, to 1.
    svg = draw(
        page,
        *(series(name, *[share] * 5) for name, share in (("a", 0.3), ("b", 0.5), ("c", 0.2))),
        stacked=True,
    )
    scale = FLOOR - CEILING
    for band, (low, high) in zip(
        heights(svg, "area"), ((0, 0.3), (0.3, 0.8), (0.8, 1)), strict=True
    ):
        assert band[:5] == pytest.approx([FLOOR - high * scale] * 5, abs=0.06)
        assert band[5:] == pytest.approx([FLOOR - low * scale] * 5, abs=0.06)
    assert not heights(svg, "line")
    assert 'd="M' in svg
    assert len(re.findall(r'class="area" d="[^"]*Z" fill="#', svg)) == 3
    # The legend says what each is, not the sum below which it lies.
    assert re.findall(r"</i>([^<]*)", svg) == ["a: 30 %", "b: 50 %", "c: 20 %"]


def test_a_series_that_is_missing_for_a_time_counts_as_nothing_in_a_stack(page):
    svg = draw(page, series("a", 1, None, 1, 1, 1), series("b", 1, 1, 1, 1, 1), stacked=True)
    lower, upper = heights(svg, "area")
    assert lower[1] == FLOOR
    assert upper[1] == pytest.approx((FLOOR + CEILING) / 2)


def test_a_panel_without_data_has_one_sentence_and_no_axes(page):
    assert draw(page) == '<p class="absent">No GPU here.</p>'


def test_a_figure_of_the_legend_does_not_squash_what_is_drawn(page):
    engine = series("engine", *[4e6] * 5)
    link = series("link", *[64e9] * 5, is_drawn=False)
    svg = draw(page, engine, link, unit="Bps")
    assert heights(svg, "line") == [[CEILING] * 5]
    assert "link: 64000 MB/s (not drawn)" in svg


def test_all_figures_of_a_panel_have_one_unit(page):
    small, large = series("small", *[557e3] * 5), series("large", *[22.8e6] * 5)
    svg = draw(page, small, large, unit="bytes")
    figures = re.findall(r'text-anchor="end">([^<:]*)</text>|: ([^<]*)</li>', svg)
    texts = [one or other for one, other in figures]
    assert texts == ["0 MB", "5 MB", "10 MB", "15 MB", "20 MB", "25 MB", "0.557 MB", "22.8 MB"]


@pytest.mark.parametrize(
    ("unit", "value", "text"),
    [
        ("percentunit", 0.1234, "12.3 %"),
        ("s", 0.25, "250 ms"),
        ("s", 33.08, "33.1 s"),
        ("s", 0.00002, "20 µs"),
        ("Bps", 1.5e9, "1.5 GB/s"),
        ("bytes", 512, "512 B"),
        ("suffix: tokens/s", 1234, "1.23 k tokens/s"),
        ("suffix: requests", 3, "3 requests"),
        ("suffix: requests", 0.25, "0.25 requests"),
    ],
)
def test_figures_are_written_in_their_unit(page, unit, value, text):
    assert page.shown(value, page.scale(value, unit)) == text


@pytest.mark.parametrize(
    ("largest", "top", "step"),
    [(0, 1, 0.2), (1.0003, 1, 0.2), (1.1, 1.5, 0.5), (7, 8, 2), (97, 100, 20)],
)
def test_axes_end_at_round_figures_just_above_what_is_drawn(page, largest, top, step):
    assert page.axis(largest) == pytest.approx([top, step])


def test_a_line_is_not_drawn_over_times_without_data(page):
    svg = draw(page, series("a", 1, None, 1, None, None))
    assert [len(run) for run in heights(svg, "line")] == [1, 1]
    assert "a: none now" in svg


def test_rates_are_over_a_step_or_a_minute_and_of_the_node_chosen(page):
    expression = 'rate(x{instance=~"$node"}[$__rate_interval])'
    assert page.filled(expression, "", 2) == 'rate(x{instance=~".+"}[60s])'
    one = page.filled(expression, "[::1]:9464", 4032)
    assert one == r'rate(x{instance=~"\\[::1\\]:9464"}[4032s])'


def test_parts_that_are_never_there_are_counted_and_not_listed(page):
    svg = draw(page, series("a", *[0.5] * 5), series("b", *[0] * 5), stacked=True)
    assert re.findall(r"<li>(?:<i.*?</i>)?([^<]*)", svg) == ["a: 50 %", "1 more: 0 throughout"]
    assert "b: 0 %" in draw(page, series("b", *[0] * 5), stacked=True)
    assert "b: 0 %" in draw(page, series("a", *[0.5] * 5), series("b", *[0] * 5))


def test_an_axis_leaves_long_units_to_the_legend(page):
    svg = draw(page, series("a", *[2100] * 5), unit="suffix: tokens/s")
    ticks = re.findall(r'text-anchor="end">([^<:]*)</text>', svg)
    assert ticks == ["0", "0.5 k", "1 k", "1.5 k", "2 k", "2.5 k"]
    assert "a: 2.1 k tokens/s" in svg


def test_labels_are_text_and_not_markup(page):
    assert "<b>" not in draw(page, series("<b>", 1, 1, 1, 1, 1))


def test_no_page_has_what_prometheus_takes_for_its_own_templates():
    for path in (DEPLOY / "consoles").glob("*.html"):
        assert "{{" not in path.read_text()
        assert SCRIPT in path.read_text()
