"""What watching costs, from windows written by hand."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fluxion_core.lab.benchmark.telemetry import Window, telemetry_report, watch_costs


def turn(speed: float, extra: float = 0.0) -> list[Window]:
    """Steps of `speed` seconds that use twice the CPU; watching adds what its kind is worth."""
    return [
        Window("unwatched", 10, 10 * speed, 20 * speed),
        Window("scrape", 1, speed + 0.02 + extra, 2 * speed + 0.01),
        Window("unwatched", 10, 10 * speed, 20 * speed),
        Window("record", 11, 11 * speed * 1.01, 22 * speed * 1.02),
        Window("file", 2, 2 * speed + 0.05, 4 * speed + 0.05),
    ]


def test_the_cost_is_what_goes_beyond_unwatched_steps_of_the_same_turn():
    # A machine that becomes three times slower for a while changes no cost in milliseconds.
    scrape, record, file = watch_costs([turn(0.1), turn(0.3), turn(0.1)])
    assert [cost.kind for cost in (scrape, record, file)] == ["scrape", "record", "file"]
    assert scrape.wall.milliseconds == pytest.approx(20)
    assert scrape.cpu.milliseconds == pytest.approx(10)
    # By hand: every 5 s; the CPU is used twice over.
    assert scrape.wall.share == pytest.approx(0.004)
    assert scrape.cpu.share == pytest.approx(0.001)
    assert (record.wall.share, record.cpu.share) == pytest.approx((0.01, 0.02))
    assert file.wall.milliseconds == pytest.approx(50)
    assert (record.steps, file.steps) == (11, 2)


def test_one_window_in_ten_at_each_end_is_left_out_and_the_rest_say_how_sure_it_is():
    turns = [turn(0.1, extra) for extra in (-9.0, *[0.001, -0.001] * 4, 9.0)]
    wall = watch_costs(turns)[0].wall
    assert wall.milliseconds == pytest.approx(20)
    # By hand: eight values a millisecond from their mean; sqrt(8 / 7) / sqrt(8).
    assert wall.error_milliseconds == pytest.approx(1 / 7**0.5)


def test_the_report_names_the_machine_and_has_every_figure():
    console = Console(file=io.StringIO(), width=200)
    report = telemetry_report(console, [turn(0.1), turn(0.1)], tokens=700, policy="exact")
    assert report["machine"]["processor"]
    assert report["step_milliseconds"] == pytest.approx(100)
    assert report["step_cpu_milliseconds"] == pytest.approx(200)
    assert [cost["kind"] for cost in report["costs"]] == ["scrape", "record", "file"]
    text = console.file.getvalue()
    assert "scrape every 5 s" in text
    assert "1.00 +- 0.00 %" in text
