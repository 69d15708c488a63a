"""Metrics of both nodes, from their definitions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from fluxion_core.observe.metrics import MetricDefinition
from generators.text import entry
from services.decode.metric_definitions import DECODE_DEFINITIONS
from services.gpu_metrics import ENGINE_GPU_DEFINITIONS, NVML_DEFINITIONS, TIER_DEFINITIONS
from services.metrics import NODE_DEFINITIONS
from services.prefill.metrics import PREFILL_DEFINITIONS

_NEEDS = {
    "": "",
    "gpu": " Only with a GPU.",
    "tier": " Only with a tier.",
    "nvml": " Only with NVML.",
}


def _entries(definitions: Iterable[MetricDefinition]) -> str:
    made = []
    for one in definitions:
        labels = ", ".join(f"`{label}`" for label in one.labels)
        about = f"{one.kind}, {one.unit}" + (f"; by {labels}" if labels else "")
        made.append(entry(one.name, about, one.meaning + _NEEDS[one.needs]))
    return "".join(made)


REGIONS: dict[str, Callable[[], str]] = {
    f"metrics {name}": partial(_entries, definitions)
    for name, definitions in {
        "of both nodes": NODE_DEFINITIONS,
        "of decode nodes": DECODE_DEFINITIONS,
        "of prefill nodes": PREFILL_DEFINITIONS,
        "with a GPU": ENGINE_GPU_DEFINITIONS,
        "with a tier": TIER_DEFINITIONS,
        "from NVML": NVML_DEFINITIONS,
    }.items()
}
