"""`fluxion info`: what a decode node serves, and how full it is."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table

from fluxion_core.client import NO_RETRIES, AsyncClient, ModelInfo, NodeLoad
from services.cli.commands.info import Info


async def run_info(options: Info) -> None:
    """Print a table; keep it as JSON if that is wanted.

    Raises:
        FluxionError: the node cannot be reached, or is no decode node.
    """
    client = options.connection.settings()
    async with AsyncClient(options.address, client, retry=NO_RETRIES) as node:
        model, load = await node.model_info(), await node.load()
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in (*rows_of_model(model), *rows_of_load(load)):
        table.add_row(name, text)
    options.console().print(table)
    options.write({"model": asdict(model), "load": asdict(load)})


def rows_of_model(model: ModelInfo) -> list[tuple[str, str]]:
    """Names and figures of what does not change while the node runs."""
    levels = "; ".join(f"{level} = {policy}" for level, policy in model.levels.items())
    return [
        ("model", f"{model.name}, {model.architecture}"),
        ("context", f"{model.context_tokens:,} tokens"),
        ("device", model.device),
        ("KV", f"{model.kv_bytes_per_token:,} bytes a token"),
        ("policy", f"{model.default_policy}, unless a request says another"),
        ("levels", levels or "none"),
        ("predictor", model.predictor_mode),
    ]


def rows_of_load(load: NodeLoad) -> list[tuple[str, str]]:
    """Names and figures of what the node does now."""
    held = load.host_kv_used_bytes + load.host_kv_reserved_bytes
    return [
        ("requests", f"{load.running_requests} running, {load.waiting_requests} waiting"),
        (
            "KV in host memory",
            f"{held / 1e9:.2f} GB held, {load.host_kv_cached_bytes / 1e9:.2f} GB cached, of "
            f"{load.host_kv_capacity_bytes / 1e9:.2f} GB",
        ),
        *_rows_of_device(load),
        ("tokens generated", f"{load.generated_tokens_total:,}"),
        *([("draining", "yes: takes no new requests")] if load.is_draining else []),
    ]


def _rows_of_device(load: NodeLoad) -> list[tuple[str, str]]:
    if not load.device_kv_capacity_bytes:
        return []
    held, capacity = load.device_kv_held_bytes / 1e9, load.device_kv_capacity_bytes / 1e9
    return [("KV in device memory", f"{held:.2f} GB held, of {capacity:.2f} GB")]
