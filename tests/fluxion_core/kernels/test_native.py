"""Native kernels, every ISA of this machine, against float64 and against plain torch."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry
from fluxion_core.kernels import isa
from fluxion_core.kernels.block_digest import cpu as block_digest
from fluxion_core.kernels.merge import cpu as merge
from fluxion_core.kernels.merge import reference as merge_reference
from fluxion_core.kernels.sparse_attention import cpu, reference
from fluxion_core.kvstore.store import HostKvStore


@pytest.fixture(params=isa.available_isas())
def each_isa(request: pytest.FixtureRequest):
    before = isa.current_isa()
    isa.set_isa(request.param)
    yield request.param
    isa.set_isa(before)


def filled_store(geometry: KvGeometry, num_slabs: int, seed: int) -> HostKvStore:
    store = HostKvStore(geometry, num_slabs * (geometry.slab_bytes + 4096), model_key=b"toy")
    generator = torch.Generator().manual_seed(seed)
    for slab in range(num_slabs):
        kv = store.slab_kv(slab)
        kv.copy_(torch.randn(kv.shape, generator=generator))
    return store


def oracle(store, slabs, tokens: range, layer: int, query, dtype):
    heads = store.geometry.num_kv_heads
    group = query.shape[0] // heads
    outputs, lses = [], []
    for head in range(heads):
        kv = torch.cat([store.slab_kv(slab)[layer, head] for slab in slabs])
        key, value = (kv[:, i].flatten(0, 1)[tokens.start : tokens.stop] for i in (0, 1))
        rows = query[head * group : (head + 1) * group].to(dtype)
        output, lse = reference.attend(rows, key.to(dtype), value.to(dtype))
        outputs.append(output)
        lses.append(lse)
    return torch.cat(outputs), torch.cat(lses)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16])
def test_attention_is_as_good_as_plain_torch(each_isa: str, group: int, head_dim: int):
    geometry = KvGeometry(num_layers=2, num_kv_heads=2, head_dim=head_dim, slab_tokens=128)
    store = filled_store(geometry, 5, seed=group * head_dim)
    slabs = [3, 0, 4, 1]
    table = torch.tensor([store.slab_address(slab) for slab in slabs])
    query = torch.randn(1, 2 * group, head_dim, generator=torch.Generator().manual_seed(1)) * 3
    tokens = range(48, 464)
    runs = cpu.BlockRuns.build([table], [tokens])
    output, lse = cpu.attend_block_runs(geometry, 1, query, runs)
    exact, exact_lse = oracle(store, slabs, tokens, 1, query[0], torch.float64)
    plain, plain_lse = oracle(store, slabs, tokens, 1, query[0], torch.float32)
    bound = 4 * (plain - exact).abs().max() + 1e-6
    assert (output[0] - exact).abs().max() <= bound
    assert (lse[0] - exact_lse).abs().max() <= 4 * (plain_lse - exact_lse).abs().max() + 4e-6


def test_sequences_of_different_lengths_do_not_mix(each_isa: str):
    geometry = KvGeometry(num_layers=1, num_kv_heads=1, head_dim=64, slab_tokens=128)
    store = filled_store(geometry, 6, seed=0)
    slabs = [[0, 1], [2], [3, 4, 5], [1]]
    ranges = [range(64, 256), range(16, 32), range(384), range(64, 64)]
    tables = [torch.tensor([store.slab_address(s) for s in row]) for row in slabs]
    query = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(2))
    runs = cpu.BlockRuns.build(tables, ranges)
    output, lse = cpu.attend_block_runs(geometry, 0, query, runs)
    for row in range(3):
        exact, exact_lse = oracle(store, slabs[row], ranges[row], 0, query[row], torch.float64)
        torch.testing.assert_close(output[row].double(), exact, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[row].double(), exact_lse, atol=1e-5, rtol=1e-5)
    assert torch.equal(output[3], torch.zeros(3, 64))
    assert torch.equal(lse[3], torch.full((3,), -math.inf))


def test_large_scores_neither_overflow_nor_vanish(each_isa: str):
    geometry = KvGeometry(num_layers=1, num_kv_heads=1, head_dim=64, slab_tokens=128)
    store = filled_store(geometry, 1, seed=3)
    query = torch.full((1, 1, 64), 300.0)
    runs = cpu.BlockRuns.build([torch.tensor([store.slab_address(0)])], [range(128)])
    output, lse = cpu.attend_block_runs(geometry, 0, query, runs)
    exact, exact_lse = oracle(store, [0], range(128), 0, query[0], torch.float64)
    torch.testing.assert_close(output[0].double(), exact, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lse[0].double(), exact_lse, atol=1e-2, rtol=1e-5)


def test_isas_give_the_same_digests(each_isa: str):
    geometry = KvGeometry(num_layers=1, num_kv_heads=2, head_dim=48, slab_tokens=128)
    store = HostKvStore(geometry, 2 * (geometry.slab_bytes + 4096), model_key=b"toy")
    kv = torch.randn(2, 8, 2, 16, 48, generator=torch.Generator().manual_seed(4)).bfloat16()
    payload = kv.contiguous()
    block_digest.ingest_blocks(
        geometry, store.slab_address(0), 0, 0, 128, payload.data_ptr(), 8 * geometry.block_bytes
    )
    for level in range(4):
        width = 1 << level
        keys = kv[:, :, 0].reshape(2, 8 // width, width * 16, 48)
        digest = store.slab_digest(0, level)[0].squeeze(1).transpose(1, 2)
        assert torch.equal(digest[..., 0], keys.amin(2))
        assert torch.equal(digest[..., 1], keys.amax(2))


@given(
    parts=st.integers(2, 5),
    empty=st.sets(st.integers(0, 4)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_merging_in_any_order_is_merging_all(parts: int, empty: set[int], seed: int):
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(parts, 3, 8, generator=generator)
    lses = torch.randn(parts, 3, generator=generator) * 10
    for part in empty:
        if part < parts:
            outputs[part], lses[part] = 0.0, -math.inf
    expected, expected_lse = merge_reference.merge(outputs.double(), lses.double())
    for order in (list(range(parts)), list(reversed(range(parts)))):
        output, lse = outputs[order[0]].clone(), lses[order[0]].clone()
        for part in order[1:]:
            merge.merge_into(output, lse, outputs[part].contiguous(), lses[part].contiguous())
        torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


def test_merge_of_two_equal_halves_is_their_mean():
    # By hand: two keys, equal scores, values 0 and 2; softmax gives a half each.
    output, lse = torch.tensor([[0.0]]), torch.tensor([0.0])
    merge.merge_into(output, lse, torch.tensor([[2.0]]), torch.tensor([0.0]))
    assert output.item() == pytest.approx(1.0)
    assert lse.item() == pytest.approx(math.log(2))


def test_arguments_that_do_not_fit_are_refused():
    geometry = KvGeometry(num_layers=1, num_kv_heads=2, head_dim=64, slab_tokens=128)
    runs = cpu.BlockRuns.build([torch.zeros(1, dtype=torch.int64)], [range(0)])
    with pytest.raises(ShapeError):
        cpu.attend_block_runs(geometry, 0, torch.zeros(1, 3, 64), runs)
    with pytest.raises(ShapeError):
        cpu.attend_block_runs(geometry, 1, torch.zeros(1, 4, 64), runs)
    with pytest.raises(ShapeError):
        cpu.attend_block_runs(geometry, 0, torch.zeros(1, 4, 64).double(), runs)
    with pytest.raises(ShapeError):
        cpu.BlockRuns.build([torch.zeros(1, dtype=torch.int64)], [range(8, 24)])
    with pytest.raises(ShapeError):
        block_digest.ingest_blocks(geometry, 0, 0, 120, 16, 0, 0)
    with pytest.raises(ShapeError):
        block_digest.append_tokens(
            geometry, torch.zeros(1), torch.zeros(1), 0, torch.zeros(1, 2, 64), torch.zeros(1)
        )
    with pytest.raises(ValueError, match="nonsense"):
        isa.set_isa("nonsense")


def test_isa_objects_share_no_weak_symbols(tmp_path: Path):
    # A weak symbol is one that the linker merges with its namesake of another ISA.
    native = Path(block_digest.__file__).parents[1] / "native"
    flags = {
        "scalar": [],
        "avx2": ["-mavx2", "-mfma"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    }
    for name, options in flags.items():
        target = tmp_path / f"{name}.o"
        command = ["c++", "-std=c++17", "-O3", "-w", "-fno-exceptions", "-fno-rtti", *options]
        source = native / "targets" / f"{name}.cpp"
        subprocess.run([*command, f"-I{native}", "-c", source, "-o", target], check=True)
        symbols = subprocess.run(["nm", target], check=True, capture_output=True, text=True)
        kinds = {line.split()[-2] for line in symbols.stdout.splitlines()}
        assert not kinds & {"W", "w", "V", "v", "u"}, symbols.stdout
    assert BLOCK_TOKENS == 16
