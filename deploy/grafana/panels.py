"""What the three dashboards show, once, for Grafana and for the console pages.

A panel is a title, a unit and lines; a line is a PromQL expression and its legend, in which
{label} stands for a label's value. All rates are over a minute: twelve scrapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Unit = Literal["reqps", "s", "Bps", "bytes", "percentunit", "short"]
"""Grafana's names: requests/s, seconds, bytes/s, bytes, 0 to 1, and plain numbers."""


@dataclass(frozen=True)
class Line:
    """One expression; several series if its labels say so."""

    expression: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One graph."""

    title: str
    unit: Unit
    lines: tuple[Line, ...]
    meaning: str
    is_stacked: bool = False


@dataclass(frozen=True)
class Dashboard:
    """One page of panels."""

    uid: str
    title: str
    panels: tuple[Panel, ...]


def rate(selector: str, *, by: str = "") -> str:
    """Summed growth per second of a counter."""
    return f"sum{f' by ({by}) ' if by else ''}(rate({selector}[1m]))"


def quantiles(histogram: str, *shares: float, of: str = "") -> tuple[Line, ...]:
    """Lines of a histogram's quantiles over all nodes; `of` names it where a panel has several."""
    return tuple(
        Line(
            f"histogram_quantile({share}, {rate(histogram + '_bucket', by='le')})",
            f"{of} p{share * 100:g}".lstrip(),
        )
        for share in shares
    )


def per(numerator: str, denominator: str) -> str:
    """One counter's growth for each of another's."""
    return f"{rate(numerator)} / {rate(denominator)}"


OVERVIEW = Dashboard(
    "fluxion-overview",
    "Fluxion: overview",
    (
        Panel(
            "Requests",
            "reqps",
            (Line(rate("fluxion_requests_total", by="outcome, status"), "{outcome} {status}"),),
            "Generate requests that ended.",
        ),
        Panel(
            "Time to first token",
            "s",
            quantiles("fluxion_time_to_first_token_seconds", 0.5, 0.95),
            "Queue, prefill and hand-off together.",
        ),
        Panel(
            "Time from token to token",
            "s",
            quantiles("fluxion_inter_token_seconds", 0.5, 0.95, 0.99),
            "As tokens leave for the client.",
        ),
        Panel(
            "Tokens",
            "short",
            (
                Line(rate("fluxion_generated_tokens_total"), "generated/s"),
                Line(rate("fluxion_prompt_tokens_total", by="source"), "prompt, {source}/s"),
            ),
            "Prompt tokens count when a request is admitted.",
        ),
        Panel(
            "Requests now",
            "short",
            (
                Line("sum(fluxion_requests_running)", "running"),
                Line("sum(fluxion_requests_waiting)", "waiting"),
                Line("sum(fluxion_prefill_prompts_running)", "prompts computed"),
                Line("sum(fluxion_prefill_prompts_waiting)", "prompts waiting"),
            ),
            "Running requests hold memory: their prompt may still be computed.",
        ),
        Panel(
            "Waiting",
            "s",
            (
                Line("max(fluxion_queue_oldest_wait_seconds)", "first of the queue"),
                *quantiles("fluxion_queue_seconds", 0.95, of="requests"),
                *quantiles("fluxion_prefill_queue_seconds", 0.95, of="prompts"),
            ),
            "The first of the queue now; then what admitted requests and prompts have waited.",
        ),
        Panel(
            "Nodes that are ready",
            "short",
            (Line("sum by (kind) (fluxion_node_ready)", "{kind}"),),
            "Model loaded, not draining.",
        ),
        Panel(
            "Prefill",
            "short",
            (
                Line(rate("fluxion_prefill_tokens_total", by="instance"), "{instance} tokens/s"),
                Line("sum(fluxion_prefill_pending_tokens)", "tokens pending"),
            ),
            "What each prefill node computes.",
        ),
    ),
)

OVERLAP = Dashboard(
    "fluxion-overlap",
    "Fluxion: GPU idle and overlap",
    (
        Panel(
            "GPU time",
            "percentunit",
            (
                Line(rate("fluxion_gpu_busy_seconds_total", by="instance"), "busy {instance}"),
                Line(
                    rate("fluxion_gpu_idle_seconds_total", by="instance, cause"),
                    "idle {cause} {instance}",
                ),
            ),
            "The engine's own measure; they add up to 1. host_attention: it waits for the CPU.",
            is_stacked=True,
        ),
        Panel(
            "GPU as its driver sees it",
            "percentunit",
            (
                Line("fluxion_nvml_activity_ratio", "{unit} {instance}"),
                Line("fluxion_nvml_utilization_ratio", "any kernel {instance}"),
            ),
            "A kernel that waits for host memory counts as active here.",
        ),
        Panel(
            "Tasks by device",
            "short",
            (Line(rate("fluxion_tasks_total", by="device"), "{device}/s"),),
            "Attention tasks over retrieval regions.",
            is_stacked=True,
        ),
        Panel(
            "Engine thread",
            "percentunit",
            (
                Line(rate("fluxion_engine_busy_seconds_total", by="instance"), "busy {instance}"),
                Line(rate("fluxion_engine_idle_seconds_total", by="instance"), "idle {instance}"),
            ),
            "Idle: there was no sequence to decode.",
        ),
        Panel(
            "Bytes read for a token",
            "bytes",
            (
                Line(per("fluxion_scanned_bytes_total", "fluxion_decode_tokens_total"), "scanned"),
                Line(
                    per("fluxion_attended_bytes_total", "fluxion_decode_tokens_total"), "attended"
                ),
                Line(
                    per("fluxion_region_bytes_total", "fluxion_decode_tokens_total"), "exact reads"
                ),
            ),
            "Digests, K and V of retrieval regions; beside them what policy exact would read.",
        ),
        Panel(
            "Shares",
            "percentunit",
            (
                Line(
                    per("fluxion_streaming_heads_total", "fluxion_planned_heads_total"),
                    "streaming heads",
                ),
                Line("fluxion:read_of_exact:ratio_rate1m", "bytes read of exact {instance}"),
            ),
            "Streaming heads read nothing of the region.",
        ),
        Panel(
            "What groups read",
            "short",
            (Line(rate("fluxion_groups_total", by="reads"), "{reads}/s"),),
            "GQA groups over all layers and steps: nothing, everything, or blocks of N tokens.",
            is_stacked=True,
        ),
        Panel(
            "Steps",
            "short",
            (
                Line(per("fluxion_decode_tokens_total", "fluxion_decode_steps_total"), "sequences"),
                Line(rate("fluxion_decode_steps_total"), "steps/s"),
            ),
            "Sequences decoded together, and how often.",
        ),
    ),
)

TRAFFIC = Dashboard(
    "fluxion-traffic",
    "Fluxion: PCIe and KV traffic",
    (
        Panel(
            "PCIe by purpose",
            "Bps",
            (
                Line(
                    rate("fluxion_pcie_bytes_total", by="direction, purpose"),
                    "{direction} {purpose}",
                ),
            ),
            "Counted by the engine.",
            is_stacked=True,
        ),
        Panel(
            "PCIe: engine and card",
            "Bps",
            (
                Line(rate("fluxion_pcie_bytes_total", by="direction"), "engine {direction}"),
                Line(rate("fluxion_nvml_pcie_bytes_total", by="direction"), "card {direction}"),
                Line("sum(fluxion_nvml_pcie_link_bytes_per_second)", "link, each direction"),
            ),
            "The card counts packet headers and other processes too.",
        ),
        Panel(
            "Share of the PCIe link",
            "percentunit",
            (Line("fluxion:pcie_link:ratio_rate1m", "{direction} {instance}"),),
            "As the card counts; about 0.9 is all that payload reaches.",
        ),
        Panel(
            "Host KV read",
            "Bps",
            (
                Line(rate("fluxion_scanned_bytes_total"), "digests"),
                Line(rate("fluxion_attended_bytes_total"), "K and V"),
            ),
            "By decode steps, whichever device read it; windows not counted.",
            is_stacked=True,
        ),
        Panel(
            "Hand-off",
            "Bps",
            (
                Line(rate("fluxion_handoff_bytes_total", by="node"), "from {node}"),
                Line(rate("fluxion_prefill_kv_bytes_total"), "made by prefill"),
            ),
            "KV that was committed, by the prefill node it came from.",
        ),
        Panel(
            "Hand-off time",
            "s",
            quantiles("fluxion_handoff_seconds", 0.5, 0.95),
            "From the first KV frame to the commit.",
        ),
        Panel(
            "Hand-off failures",
            "short",
            (Line(rate("fluxion_handoff_failures_total", by="reason"), "{reason}/s"),),
            "Attempts; another prefill node may have done it after.",
        ),
        Panel(
            "Host KV store",
            "bytes",
            (
                Line("sum by (state) (fluxion_store_bytes)", "{state}"),
                Line("sum(fluxion_store_shared_bytes)", "of it shared"),
            ),
            "The states add up to the capacity.",
        ),
    ),
)

DASHBOARDS = {"overview": OVERVIEW, "overlap": OVERLAP, "traffic": TRAFFIC}
"""By the name of their files."""
