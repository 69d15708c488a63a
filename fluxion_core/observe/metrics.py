"""Parts of the nodes' metrics: definitions, plain histograms, and their rendering.

A metric is defined once, as data, with its unit and its meaning; counting happens elsewhere, in
plain numbers that one thread adds to, and a scrape reads them. No metric is defined here: those of
a node are in its metrics.py.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric

Labels = tuple[str, ...]
Samples = Mapping[Labels, float]
"""Values by the values of their labels; () where there are no labels."""


class PlainHistogram:
    """Counts observations by upper bound. One writer; reading needs no lock.

    Args:
        bounds: upper bounds, ascending; what lies above the last one is counted too.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self._counts = [0] * (len(self.bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value. Below a microsecond."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self._sum += value

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative counts by upper bound, the last of them "+Inf", and the sum of all values."""
        counts, total, rows = list(self._counts), 0, []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), counts, strict=True):
            total += count
            rows.append((bound, float(total)))
        return rows, self._sum


@dataclass(frozen=True)
class MetricDefinition:
    """One metric family: what operators read in docs/reference/metrics.md."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    meaning: str
    labels: Labels = ()
    needs: Literal["", "gpu", "tier", "nvml"] = ""
    """What must be there for it to be exported: a GPU that the engine uses, a tier of the KV store
    there, or NVML."""

    def render(self, samples: Samples) -> Metric:
        """A counter or gauge with these values."""
        family: CounterMetricFamily | GaugeMetricFamily
        if self.kind == "counter":
            family = CounterMetricFamily(self.name, self.meaning, labels=self.labels)
        else:
            family = GaugeMetricFamily(self.name, self.meaning, labels=self.labels)
        for labels, value in samples.items():
            family.add_metric(labels, value)
        return family

    def render_value(self, value: float) -> Metric:
        """A counter or gauge without labels."""
        return self.render({(): value})

    def render_histogram(self, histograms: Mapping[Labels, PlainHistogram]) -> Metric:
        """A histogram; one for each combination of labels."""
        family = HistogramMetricFamily(self.name, self.meaning, labels=self.labels)
        for labels, histogram in histograms.items():
            buckets, total = histogram.buckets()
            family.add_metric(labels, buckets, total)
        return family
