"""`fluxion info` against a real node of the toy model."""

from __future__ import annotations

import asyncio
import json

from fluxion_core.client import NodeLoad
from services.cli.info import rows_of_load
from tests.services.cli.command_line import invoke


async def test_a_node_says_what_it_serves_and_how_full_it_is(start_decode):
    async with start_decode() as node:
        shown = await asyncio.to_thread(invoke, ["info", node.address])
        kept = await asyncio.to_thread(invoke, ["info", node.address, "--json", "-"])
    assert shown.exit_code == 0, shown.output
    for words in ("2,048 tokens", "exact, unless a request says another", "0 running, 0 waiting"):
        assert words in shown.stdout
    report = json.loads(kept.stdout)
    assert report["model"]["context_tokens"] == 2048
    assert report["load"]["running_requests"] == 0
    assert "context" in kept.stderr


def test_a_node_that_is_going_away_says_so():
    load = NodeLoad(1, 2, 8_000_000_000, 0, 1_000_000_000, 2_000_000_000, 0, 7, is_draining=True)
    # By hand: reserved and used are held.
    assert rows_of_load(load) == [
        ("requests", "1 running, 2 waiting"),
        ("KV in host memory", "3.00 GB held, 0.00 GB cached, of 8.00 GB"),
        ("tokens generated", "7"),
        ("draining", "yes: takes no new requests"),
    ]


def test_kv_in_device_memory_has_a_row_where_there_is_any():
    load = NodeLoad(0, 0, 8_000_000_000, 0, 0, 0, 0, 7, False, 80_000_000_000, 12_500_000_000)
    assert ("KV in device memory", "12.50 GB held, of 80.00 GB") in rows_of_load(load)


def test_no_node_is_one_sentence():
    result = invoke(["info", "127.0.0.1:1"])
    assert result.exit_code == 1
    assert "no node accepts connections at 127.0.0.1:1" in result.stderr
