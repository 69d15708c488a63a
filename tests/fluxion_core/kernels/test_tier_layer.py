"""A whole layer with a tier, the host's part native: it is the same whatever is resident."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fluxion_core.kernels import _native
from fluxion_core.kernels.dense_attention.triton import WindowStates
from fluxion_core.kernels.isa import native_layout
from fluxion_core.kernels.tier.attention import ResidentAttention
from fluxion_core.kernels.tier.host_wait import HostWait
from fluxion_core.kernels.tier.merge import HostStates, TierMerge
from fluxion_core.pool.cpu_pool import CpuPool
from tests.fluxion_core.kernels.test_tier_selection import (
    ALL,
    DEVICE,
    KV_HEADS,
    LAYER,
    LAYERS,
    NOTHING,
    NUM_SLOTS,
    STEP,
    Node,
    Row,
    Selected,
    both_see,
    int32s,
)

HEAD_DIM = 16


def tasks_of(node: Node) -> _native.LayerAttention:
    """The native attention of the node's rows, the padding included, under their plans."""
    addresses = [table.data_ptr() for table in node.slab_addresses]
    views = [
        (address, row.region.stop, row.region.start, row.region.stop, 0)
        for row, address in zip(node.rows, addresses, strict=True)
    ]
    sources = [
        _native.GivenPlans(
            np.array([row.levels], np.int32), np.array([row.budgets[: node.heads]], np.int32)
        )
        for row in node.rows
    ]
    layout = native_layout(node.geometry)
    return _native.LayerAttention(layout, np.array(views, np.int64), node.heads, sources)


def host_part(
    node: Node, tasks: _native.LayerAttention, selected: Selected | None
) -> tuple[Tensor, Tensor]:
    """Output and lse of what the host reads: what is listed, or what it chooses itself."""
    output = both_see(torch.full((len(node.rows), node.heads, HEAD_DIM), torch.nan))
    lse = both_see(torch.full((len(node.rows), node.heads), torch.nan))
    lists = None
    if selected is not None:
        host = selected.host
        lists = host.units.numpy(), host.masks.numpy(), host.counts.numpy()
    pool = CpuPool(1)
    arrays = node.query.cpu().numpy(), output.numpy(), lse.numpy()
    tasks.submit(pool.native, LAYER, *arrays, 0, lists=lists)
    pool.wait()
    tasks.finish_layer()
    return output, lse


def tier_of(node: Node) -> Tensor:
    """[slots, block_bytes] uint8 on the device: the units that the table says are there."""
    block_bytes = node.geometry.block_bytes
    tier = torch.full((NUM_SLOTS, block_bytes), 255, dtype=torch.uint8)
    for unit, slot in enumerate(node.tables.table.tolist()):
        if slot >= 0:
            slab, at = divmod(unit, node.slab_units)
            tier[slot] = node.arena[slab, at * block_bytes : (at + 1) * block_bytes]
    return tier.to(DEVICE)


def merged(node: Node, selected: Selected, host: HostStates) -> Tensor:
    """Output of the layer; the windows are empty."""
    rows = len(node.rows)
    attention = ResidentAttention(node.heads, KV_HEADS, HEAD_DIM, programs=16)
    states = attention.make_states(rows, DEVICE)
    counts = selected.counts.to(DEVICE)
    window = WindowStates(
        torch.zeros(rows, node.heads, 1, HEAD_DIM, device=DEVICE),
        *(torch.full((rows, node.heads, 1), -torch.inf, device=DEVICE) for _ in range(2)),
    )
    output = torch.full((rows, node.heads, HEAD_DIM), torch.nan, device=DEVICE)
    answered, skip, error = (both_see(torch.zeros(1, dtype=torch.int32)) for _ in range(3))
    # The host has answered where anything misses.
    answered[0] = STEP if selected.host.counts.any() else 0
    has_answer = int32s(1)
    wait = HostWait(
        int32s(1),
        answered,
        skip,
        selected.needs[LAYER : LAYER + 1].to(DEVICE),
        int32s(1, value=STEP),
        error,
        torch.zeros(2, dtype=torch.int64, device=DEVICE),
        has_answer,
        timeout_ns=1_000_000_000,
        error_code=1,
    )
    attention.launch(
        node.query,
        tier_of(node),
        selected.lists.resident_slots.to(DEVICE),
        selected.lists.resident_masks.to(DEVICE),
        counts,
        states,
        wait,
    )
    merge = TierMerge(node.heads, KV_HEADS, HEAD_DIM)
    merge.merge(window, states, host, counts, has_answer, output, None)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    assert error.item() == 0
    return output.cpu()


@pytest.mark.parametrize("share", [0.0, 0.4, 0.95, 1.0])
def test_a_layer_is_the_same_whatever_is_resident(share: float):
    node = Node(
        Row([2, 0, 3], range(64, 592), [0, ALL]),
        Row([4, 1], range(112, 400), [2, NOTHING], [1, 0, 2, 1, 0, 0, 0, 0]),
    )
    node.hold(share)
    # What is asked for on the way is marked in the table, and is not there.
    selected = node.run()
    plain = tasks_of(node)
    expected, _ = host_part(node, plain, None)
    tasks = tasks_of(node)
    output, lse = host_part(node, tasks, selected)
    rows = merged(node, selected, HostStates(output, lse))
    torch.testing.assert_close(rows[:2], expected[:2], atol=2e-5, rtol=2e-5)
    assert not rows[2].any()
    counts = np.zeros((LAYERS, len(node.rows), KV_HEADS, 2), np.int32)
    counts[LAYER] = selected.counts.numpy()
    tasks.count_selected(counts)
    for row in range(3):
        scanned, attended, _, resident = tasks.read_bytes(row)
        assert (scanned, attended) == plain.read_bytes(row)[:2]
        missing = int(selected.host.counts[row].sum())
        assert attended - resident == missing * node.geometry.block_bytes
