"""`fluxion top`: what nodes do now, live in a terminal, from their metrics endpoints.

Two looks at /metrics, a few seconds apart, give rates; nothing is kept. What a node does not
export (GPU figures where there is no GPU) has no row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from http.client import HTTPException

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.live import Live
from rich.table import Table

from fluxion_core.config.addresses import address_of
from fluxion_core.config.carriers import Carrier
from fluxion_core.errors import PeerUnavailableError
from services.cli.commands.top import Top
from services.cli.http import get, reason_of

FETCH_SECONDS = 5.0

Samples = dict[str, float]
"""Sums over all labels by sample name, and by `name{value}` for each single label's value."""


def fetch_samples(address: str) -> Samples:
    """One look at a node.

    Raises:
        PeerUnavailableError: nothing answers there, or it is not a node's metrics endpoint.
        ConfigError: it is not HOST:PORT.
    """
    where = address_of(address, "ADDRESSES:")
    try:
        with get(f"http://{where}/metrics", seconds=FETCH_SECONDS) as answer:
            text = answer.read().decode()
        samples = parse_samples(text)
    except (OSError, HTTPException, ValueError) as error:
        raise PeerUnavailableError(
            f"no metrics at {address} ({reason_of(error)}); is it a node's server.metrics_listen?"
        ) from None
    if "fluxion_node_ready" not in samples:
        raise PeerUnavailableError(f"{address} serves metrics, but is no Fluxion node")
    return samples


def parse_samples(text: str) -> Samples:
    """Sum an exposition's samples over their labels."""
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            names = [
                sample.name,
                *(f"{sample.name}{{{value}}}" for value in sample.labels.values()),
            ]
            for name in names:
                samples[name] = samples.get(name, 0.0) + sample.value
    return samples


def rows_of(before: Samples, now: Samples, seconds: float) -> list[tuple[str, str]]:
    """Rows that are shown of one node: a name and a figure with its unit."""

    def grown(name: str) -> float:
        return now.get(name, 0.0) - before.get(name, 0.0)

    rows = [("ready", "yes" if now["fluxion_node_ready"] else "no")]

    def rate(label: str, name: str, unit: str, scale: float = 1.0) -> None:
        if name in now:
            rows.append((label, f"{grown(name) / seconds / scale:,.1f} {unit}"))

    def share(label: str, part: str, whole: Sequence[str]) -> None:
        total = sum(grown(name) for name in whole)
        if part in now and total > 0:
            rows.append((label, f"{grown(part) / total * 100:.0f} %"))

    for label, name in (
        ("requests running", "fluxion_requests_running"),
        ("requests waiting", "fluxion_requests_waiting"),
        ("prompts computed", "fluxion_prefill_prompts_running"),
        ("prompts waiting", "fluxion_prefill_prompts_waiting"),
    ):
        if name in now:
            rows.append((label, f"{now[name]:.0f}"))
    rate("tokens generated", "fluxion_generated_tokens_total", "/s")
    rate("prompt tokens", "fluxion_prefill_tokens_total", "/s")
    handed_off = "fluxion_handoff_bytes_total"
    ways = ", ".join(way for way in Carrier if grown(f"{handed_off}{{{way}}}"))
    rate("KV handed off", handed_off, f"MB/s by {ways}" if ways else "MB/s", 1e6)
    rate("KV threads", "fluxion_data_plane_cpu_seconds_total", "CPUs")
    rate("KV attended", "fluxion_attended_bytes_total", "MB/s", 1e6)
    rate("digests scanned", "fluxion_scanned_bytes_total", "MB/s", 1e6)
    if missed := _levels_that_miss(now):
        rows.append(("levels that miss their aim", missed))
    share("streaming heads", "fluxion_streaming_heads_total", ["fluxion_planned_heads_total"])
    gpu = ("fluxion_gpu_busy_seconds_total", "fluxion_gpu_idle_seconds_total")
    share("GPU busy", gpu[0], gpu)
    share("GPU waits for CPU", gpu[1] + "{host_attention}", gpu)
    rate("PCIe to GPU", "fluxion_pcie_bytes_total{host_to_device}", "GB/s", 1e9)
    hits = "fluxion_tier_hit_bytes_total"
    share("tier hits", hits, [hits, "fluxion_tier_missed_bytes_total"])
    if "fluxion_tier_capacity_bytes" in now:
        held, capacity = now["fluxion_tier_held_bytes"], now["fluxion_tier_capacity_bytes"]
        rows.append(("tier held", f"{held / 1e9:,.1f} of {capacity / 1e9:,.1f} GB"))
    if in_host := now.get("fluxion_tier_digest_bytes{host}", 0):
        digests = in_host + now["fluxion_tier_digest_bytes{device}"]
        rows.append(("digests in host memory", f"{in_host / 1e9:,.1f} of {digests / 1e9:,.1f} GB"))
    if "fluxion_store_capacity_bytes" in now:
        held = now["fluxion_store_bytes{used}"] + now["fluxion_store_bytes{reserved}"]
        rows.append(("store held", f"{held / now['fluxion_store_capacity_bytes'] * 100:.0f} %"))
    return rows


def _levels_that_miss(now: Samples) -> str:
    """Their names; "none" if all do what they promise, empty if none was measured."""
    start = "fluxion_head_error_missed{"
    levels = {name[len(start) : -1]: now[name] for name in now if name.startswith(start)}
    return ", ".join(level for level, missed in levels.items() if missed) or "none" * bool(levels)


def run_top(options: Top, console: Console, *, sleep: Callable[[float], None] = time.sleep) -> None:
    """Show the nodes until interrupted, or for so many updates.

    Raises:
        PeerUnavailableError: a node does not answer.
    """
    looks = {address: (time.monotonic(), fetch_samples(address)) for address in options.addresses}
    done = 0
    with Live(console=console, auto_refresh=False) as live:
        while not options.updates or done < options.updates:
            sleep(options.interval_seconds)
            table = Table(box=None, pad_edge=False)
            for heading in ("node", "", "now"):
                table.add_column(heading, justify="right" if heading == "now" else "left")
            for address in options.addresses:
                since, old = looks[address]
                at, new = time.monotonic(), fetch_samples(address)
                for place, (label, figure) in enumerate(rows_of(old, new, max(1e-9, at - since))):
                    table.add_row("" if place else address, label, figure)
                looks[address] = (at, new)
            live.update(table, refresh=True)
            done += 1
