"""Plain histograms and how definitions are rendered."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from fluxion_core.observe.metrics import MetricDefinition, PlainHistogram


class _Collector:
    def __init__(self, *families):
        self._families = families

    def collect(self):
        return self._families


def exposition(*families) -> str:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(*families))
    return generate_latest(registry).decode()


def test_a_value_on_a_bound_counts_below_it_and_buckets_add_up():
    histogram = PlainHistogram([0.5, 1, 2])
    for value in (0.5, 0.6, 1.0, 1.5, 7.0):
        histogram.observe(value)
    # By hand: at most 0.5: one; at most 1: three; at most 2: four; in all five.
    buckets, total = histogram.buckets()
    assert buckets == [("0.5", 1.0), ("1", 3.0), ("2", 4.0), ("+Inf", 5.0)]
    assert total == 10.6


def test_a_histogram_is_rendered_with_count_and_sum():
    histogram = PlainHistogram([1])
    histogram.observe(3.0)
    definition = MetricDefinition("fluxion_wait_seconds", "histogram", "seconds", "Waiting.")
    text = exposition(definition.render_histogram({(): histogram}))
    assert "# TYPE fluxion_wait_seconds histogram" in text
    assert 'fluxion_wait_seconds_bucket{le="1"} 0.0' in text
    assert 'fluxion_wait_seconds_bucket{le="+Inf"} 1.0' in text
    assert "fluxion_wait_seconds_count 1.0" in text
    assert "fluxion_wait_seconds_sum 3.0" in text


def test_a_counter_keeps_its_name_and_labels():
    definition = MetricDefinition("fluxion_x_total", "counter", "x", "Xs.", ("way",))
    text = exposition(definition.render({("in",): 2, ("out",): 3}))
    assert "# TYPE fluxion_x_total counter" in text
    assert 'fluxion_x_total{way="in"} 2.0' in text
    assert 'fluxion_x_total{way="out"} 3.0' in text
