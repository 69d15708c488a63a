"""What the three dashboards show, once, for Grafana and for the console pages.

A panel is a title, a unit and lines; a line is a PromQL expression and its legend, in which
{label} stands for a label's value. Two words in an expression are filled in where it is asked:
$node, a regular expression of the nodes chosen, and $__rate_interval, over how long a rate is: a
minute, or a step of the graph if that is longer.
"""

from __future__ import annotations

from dataclasses import dataclass

NODES = '{instance=~"$node"}'


@dataclass(frozen=True)
class Line:
    """One expression; several series if its labels say so."""

    expression: str
    legend: str
    is_drawn: bool = True
    """If not, it is a figure in the legend: a limit that would squash what is drawn."""


@dataclass(frozen=True)
class Panel:
    """One graph."""

    title: str
    unit: str
    """Grafana's name: s, bytes, Bps, percentunit (0 to 1), or "suffix: " and what is counted."""
    lines: tuple[Line, ...]
    meaning: str
    absent: str
    """Why there is nothing to show, where there is nothing: one sentence."""
    is_stacked: bool = False


@dataclass(frozen=True)
class Dashboard:
    """One page of panels."""

    uid: str
    title: str
    panels: tuple[Panel, ...]


def gauge(metric: str, *, by: str = "", over: str = "sum") -> str:
    """Sum, or another aggregation, of a gauge."""
    return f"{over}{f' by ({by}) ' if by else ''}({metric}{NODES})"


def rate(counter: str, *, by: str = "", over: str = "sum") -> str:
    """Summed growth per second of a counter, or another aggregation of it."""
    return f"{over}{f' by ({by}) ' if by else ''}(rate({counter}{NODES}[$__rate_interval]))"


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


NO_DECODE_NODE = "Only a decode node has these figures, and none was scraped in this range."
NO_PREFILL_NODE = "Only a prefill node has these figures, and none was scraped in this range."
NO_GPU = "Only a node with a GPU has these figures, and none was scraped in this range."
NO_TIER = (
    "Only a decode node that holds KV in device memory has these figures, and none was scraped in "
    "this range."
)
NO_NVML = (
    "Only a node whose GPU answers NVML has these figures, and none was scraped in this range."
)
NO_STEP = "No decode step was made in this range."
NO_PROMPT = "No prompt came from a prefill node in this range."

OVERVIEW = Dashboard(
    "fluxion-overview",
    "Fluxion: overview",
    (
        Panel(
            "Requests",
            "suffix: requests/s",
            (Line(rate("fluxion_requests_total", by="outcome, status"), "{outcome} {status}"),),
            "Generate requests that ended.",
            "No request has ended on the nodes chosen.",
        ),
        Panel(
            "Time to first token",
            "s",
            quantiles("fluxion_time_to_first_token_seconds", 0.5, 0.95),
            "Queue, prefill and hand-off together.",
            "No request had its first token in this range.",
        ),
        Panel(
            "Time from token to token",
            "s",
            quantiles("fluxion_inter_token_seconds", 0.5, 0.95, 0.99),
            "As tokens leave for the client.",
            "No stream sent a second token in this range.",
        ),
        Panel(
            "Tokens",
            "suffix: tokens/s",
            (
                Line(rate("fluxion_generated_tokens_total"), "generated"),
                Line(rate("fluxion_prompt_tokens_total", by="source"), "prompt, {source}"),
            ),
            "Prompt tokens count when a request is admitted.",
            NO_DECODE_NODE,
        ),
        Panel(
            "Requests now",
            "suffix: requests",
            (
                Line(gauge("fluxion_requests_running"), "running"),
                Line(gauge("fluxion_requests_waiting"), "waiting"),
                Line(gauge("fluxion_prefill_prompts_running"), "their prompts computed"),
                Line(gauge("fluxion_prefill_prompts_waiting"), "their prompts waiting"),
                Line(gauge("fluxion_prefill_prompts_paused"), "their prompts paused"),
            ),
            "Running requests hold memory: their prompt may still be computed.",
            "No node was scraped in this range.",
        ),
        Panel(
            "Waiting",
            "s",
            (
                Line(gauge("fluxion_queue_oldest_wait_seconds", over="max"), "first of the queue"),
                *quantiles("fluxion_queue_seconds", 0.95, of="requests"),
                *quantiles("fluxion_prefill_queue_seconds", 0.95, of="prompts"),
            ),
            "The first of the queue now; then what admitted requests and prompts have waited.",
            "Nobody waited on the nodes chosen in this range.",
        ),
        Panel(
            "Prompts computed",
            "suffix: tokens/s",
            (Line(rate("fluxion_prefill_tokens_total", by="instance"), "{instance}"),),
            "By each prefill node.",
            NO_PREFILL_NODE,
        ),
        Panel(
            "Prompts still to compute",
            "suffix: tokens",
            (Line(gauge("fluxion_prefill_pending_tokens", by="instance"), "{instance}"),),
            "Tokens of prompts that run or wait on each prefill node.",
            NO_PREFILL_NODE,
        ),
        Panel(
            "Who computes prompts",
            "suffix: requests/s",
            (
                Line(
                    rate("fluxion_prompt_placements_total", by="computed_by, reason"),
                    "{computed_by}: {reason}",
                ),
            ),
            "The node of each prompt admitted, and why it was chosen.",
            NO_DECODE_NODE,
        ),
        Panel(
            "Nodes that are ready",
            "suffix: nodes",
            (
                Line(gauge("fluxion_node_ready", by="kind"), "{kind}"),
                Line(
                    gauge("fluxion_prefill_nodes_answering", by="instance"),
                    "prefill, as {instance} sees it",
                ),
            ),
            "Model loaded, not draining, and for decode nodes: a prefill node answers.",
            "No node was scraped in this range.",
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
                Line(rate("fluxion_gpu_busy_seconds_total", over="avg"), "busy"),
                Line(
                    rate("fluxion_gpu_idle_seconds_total", by="cause", over="avg"), "idle {cause}"
                ),
            ),
            "The engine's own measure, mean of the nodes chosen; adds up to 100 %. host_attention: "
            "it waits for the CPU.",
            NO_GPU,
            is_stacked=True,
        ),
        Panel(
            "GPU as its driver sees it",
            "percentunit",
            (
                Line(f"fluxion_nvml_activity_ratio{NODES}", "{unit} {instance}"),
                Line(f"fluxion_nvml_utilization_ratio{NODES}", "any kernel {instance}"),
            ),
            "A kernel that waits for host memory counts as active here.",
            NO_NVML,
        ),
        Panel(
            "Tasks by device",
            "suffix: tasks/s",
            (Line(rate("fluxion_tasks_total", by="device"), "{device}"),),
            "Attention tasks over retrieval regions.",
            NO_DECODE_NODE,
            is_stacked=True,
        ),
        Panel(
            "Engine thread",
            "percentunit",
            (
                Line(rate("fluxion_engine_busy_seconds_total", over="avg"), "busy"),
                Line(rate("fluxion_engine_idle_seconds_total", over="avg"), "idle"),
            ),
            "Mean of the decode nodes chosen. Idle: there was no sequence to decode.",
            NO_DECODE_NODE,
            is_stacked=True,
        ),
        Panel(
            "CPU pool: threads",
            "suffix: threads",
            (Line(gauge("fluxion_pool_threads", by="instance"), "{instance}"),),
            "That work on a round of attention, the engine's own included.",
            NO_DECODE_NODE,
        ),
        Panel(
            "CPU pool: threads without their CPU",
            "suffix: stalls/s",
            (Line(rate("fluxion_pool_stalls_total", by="instance"), "{instance}"),),
            "Others waited for them; another process had the CPU.",
            NO_DECODE_NODE,
        ),
        Panel(
            "CPU pool: CPUs left out",
            "suffix: cpus",
            (Line(gauge("fluxion_pool_left_out_cpus", by="instance"), "{instance}"),),
            "Because threads were kept waiting there; until they answer again.",
            NO_DECODE_NODE,
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
            NO_STEP,
        ),
        Panel(
            "Shares",
            "percentunit",
            (
                Line(
                    per("fluxion_streaming_heads_total", "fluxion_planned_heads_total"),
                    "streaming heads",
                ),
                Line(
                    f"fluxion:read_of_exact:ratio_rate1m{NODES}", "bytes read of exact {instance}"
                ),
            ),
            "Streaming heads read nothing of the region.",
            "No step over more than the default window was made in this range.",
        ),
        Panel(
            "What heads lose",
            "percentunit",
            (Line(f"fluxion_head_error{NODES}", "{level} {error} {instance}"),),
            "Root mean square of head output errors by quality level, over its last samples; true, "
            "and as its plans predicted them.",
            "No group was measured by the nodes chosen: their steps run on a GPU or read all, "
            "or it is switched off.",
        ),
        Panel(
            "What groups read",
            "suffix: groups/s",
            (Line(rate("fluxion_groups_total", by="reads"), "{reads}"),),
            "GQA groups over all layers and steps: nothing, everything, or blocks of N tokens.",
            NO_DECODE_NODE,
            is_stacked=True,
        ),
        Panel(
            "Sequences decoded together",
            "suffix: sequences",
            (Line(per("fluxion_decode_tokens_total", "fluxion_decode_steps_total"), "mean"),),
            "Of the steps made.",
            NO_STEP,
        ),
        Panel(
            "Steps",
            "suffix: steps/s",
            (Line(rate("fluxion_decode_steps_total", by="instance"), "{instance}"),),
            "Each makes one token of every sequence that is decoded.",
            NO_DECODE_NODE,
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
            NO_GPU,
            is_stacked=True,
        ),
        Panel(
            "PCIe: engine and card",
            "Bps",
            (
                Line(rate("fluxion_pcie_bytes_total", by="direction"), "engine {direction}"),
                Line(rate("fluxion_nvml_pcie_bytes_total", by="direction"), "card {direction}"),
                Line(
                    gauge("fluxion_nvml_pcie_link_bytes_per_second"),
                    "link, each direction",
                    is_drawn=False,
                ),
            ),
            "The card counts packet headers and other processes too.",
            NO_GPU,
        ),
        Panel(
            "Share of the PCIe link",
            "percentunit",
            (Line(f"fluxion:pcie_link:ratio_rate1m{NODES}", "{direction} {instance}"),),
            "As the card counts; about 90 % is all that payload reaches.",
            NO_NVML,
        ),
        Panel(
            "Stored KV read",
            "Bps",
            (
                Line(rate("fluxion_scanned_bytes_total"), "digests"),
                Line(rate("fluxion_attended_bytes_total"), "K and V"),
                Line(
                    rate("fluxion_tier_hit_bytes_total"),
                    "K and V in device memory, of them",
                    is_drawn=False,
                ),
            ),
            "By decode steps, whichever device read it, wherever; windows not counted.",
            NO_DECODE_NODE,
            is_stacked=True,
        ),
        Panel(
            "Device tier: hits",
            "percentunit",
            (Line(f"fluxion:tier_hits:ratio_rate1m{NODES}", "{policy} {instance}"),),
            "Of the K and V that policies chose of regions, what lay in device memory.",
            "No step over more than the default window was made by a node that holds KV in device "
            "memory.",
        ),
        Panel(
            "Device tier: fills and misses",
            "Bps",
            (
                Line(rate("fluxion_tier_filled_bytes_total"), "filled"),
                Line(rate("fluxion_tier_evicted_bytes_total"), "evicted"),
                Line(rate("fluxion_tier_missed_bytes_total", by="policy"), "missed {policy}"),
            ),
            "Misses are read in host memory, once for each step that chooses them; evicted is what "
            "made room for others.",
            NO_TIER,
        ),
        Panel(
            "Device tier: memory",
            "bytes",
            (
                Line(gauge("fluxion_tier_held_bytes", by="instance"), "held {instance}"),
                Line(gauge("fluxion_tier_capacity_bytes", by="instance"), "capacity {instance}"),
                Line(gauge("fluxion_tier_digest_bytes", by="memory"), "digests in {memory}"),
                Line(gauge("fluxion_tier_digest_capacity_bytes"), "room for digests"),
            ),
            "A copy of what the host holds: it may be full, and nobody waits for it. Digests in "
            "host memory are read over PCIe by every step that chooses by them.",
            NO_TIER,
        ),
        Panel(
            "Hand-off",
            "Bps",
            (
                Line(rate("fluxion_handoff_bytes_total", by="node"), "from {node}"),
                Line(rate("fluxion_prefill_kv_bytes_total"), "made by prefill"),
                Line(rate("fluxion_prefill_taken_bytes_total"), "taken from prefill"),
            ),
            "KV that was committed, by the prefill node it came from.",
            NO_PROMPT,
        ),
        Panel(
            "Hand-off by way",
            "Bps",
            (Line(rate("fluxion_handoff_bytes_total", by="way"), "{way}"),),
            "KV that was committed, by what it came over: shared memory, sockets, the call itself.",
            NO_PROMPT,
            is_stacked=True,
        ),
        Panel(
            "Hand-off: CPUs of the data plane",
            "percentunit",
            (Line(rate("fluxion_data_plane_cpu_seconds_total", by="kind"), "{kind}"),),
            "Of one CPU: threads that move KV beside its calls; event loops are not among them.",
            "No node was scraped in this range.",
        ),
        Panel(
            "Hand-off: connections refused",
            "suffix: connections/s",
            (Line(rate("fluxion_prefill_refused_connections_total", by="reason"), "{reason}"),),
            "At prefill nodes' ports for KV: no hand-off of theirs, or not any more.",
            NO_PREFILL_NODE,
        ),
        Panel(
            "Hand-off time",
            "s",
            quantiles("fluxion_handoff_seconds", 0.5, 0.95),
            "From the first KV frame to the commit.",
            NO_PROMPT,
        ),
        Panel(
            "Hand-off failures",
            "suffix: attempts/s",
            (Line(rate("fluxion_handoff_failures_total", by="reason"), "{reason}"),),
            "Attempts; another prefill node may have done it after.",
            "No hand-off has failed on the nodes chosen.",
        ),
        Panel(
            "Answers that nobody took",
            "suffix: calls/s",
            (Line(rate("fluxion_unread_calls_total", by="kind"), "{kind}"),),
            "Calls ended because their client did not read (server.unread_seconds).",
            "No node was scraped in this range.",
        ),
        Panel(
            "Host KV store",
            "bytes",
            (
                Line(gauge("fluxion_store_bytes", by="state"), "{state}"),
                Line(gauge("fluxion_store_shared_bytes"), "shared, of it", is_drawn=False),
            ),
            "The states add up to the capacity.",
            NO_DECODE_NODE,
            is_stacked=True,
        ),
    ),
)

DASHBOARDS = {"overview": OVERVIEW, "overlap": OVERLAP, "traffic": TRAFFIC}
"""By the name of their files."""
