"""What the native module refuses, by group of its functions: it reads no array that does not fit.

A wrong dtype, shape, order or device is a ShapeError that names the array; what is no array, or may
not be written, is a TypeError.
"""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import KvGeometry
from fluxion_core.kernels import _native
from fluxion_core.kernels.isa import native_layout
from fluxion_core.planning.constants import NUM_FEATURES, RADII
from fluxion_core.pool.cpu_pool import CpuPool
from tests.fluxion_core.planning.random_planner import make_planner, random_network

GEOMETRY = KvGeometry(num_layers=2, num_kv_heads=2, head_dim=16, slab_tokens=128)
LAYOUT = native_layout(GEOMETRY)
HEADS = 4


def floats(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def int32s(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int32)


def int64s(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int64)


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def attention(rows: int = 1) -> _native.LayerAttention:
    return _native.LayerAttention(LAYOUT, int64s(rows, 5), HEADS, [None] * rows)


def dense() -> _native.DenseLayers:
    def product(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(outputs // 16, inputs, 16), torch.zeros(outputs)

    norms = [[torch.zeros(32), torch.zeros(32)]]
    qkv = (HEADS + 4) * 16
    products = [[product(qkv, 32), product(32, HEADS * 16), product(64, 32), product(32, 32)]]
    frequencies, norm = floats(8), torch.zeros(32)
    return _native.DenseLayers(
        32, HEADS, 2, 16, 1e-5, frequencies, norms, products, norm, product(48, 32)
    )


def board(**changed: object) -> list[object]:
    arrays: dict[str, object] = {
        "published": int32s(2, 3),
        "answered": int32s(2),
        "skip": int32s(2),
        "rows": floats(2, 3, (HEADS + 4) * 16),
        "output": floats(3, HEADS, 16),
        "lse": floats(3, HEADS),
        "device_queries": 0,
        "planned": int32s(2, 3, 2),
        "plan_levels": int32s(2, 3, 2),
        "plan_budgets": int32s(2, 3, HEADS),
    }
    return list((arrays | changed).values())


@pytest.mark.parametrize(
    ("array", "wrong"),
    [
        (floats(3, 4).astype(np.float64), "scores is float64; need float32"),
        (floats(3), r"scores has shape \[3\]; need \[any, any\]"),
        (floats(4, 3).T, r"scores has strides \[1, 3\] for shape \[3, 4\]; it must be contiguous"),
        (torch.zeros(3, 4, dtype=torch.bfloat16), "scores is bfloat16; need float32"),
        (torch.zeros(3, 4, device="meta"), None),
        (floats(3, 4).ctypes.data, None),
        (None, None),
    ],
    ids=["dtype", "shape", "order", "bfloat16", "no memory", "address", "none"],
)
def test_what_is_wrong_with_an_array_is_said(array, wrong):
    error = (TypeError, BufferError) if wrong is None else ShapeError
    with pytest.raises(error, match=wrong):
        _native.choose_top(array, int32s(3), int64s(3, 1))


def test_a_result_that_may_not_be_written_is_a_type_error():
    with pytest.raises(TypeError):
        _native.choose_top(floats(3, 4), int32s(3), read_only(int64s(3, 1)))


def test_operations_refuse_what_does_not_fit():
    with pytest.raises(ShapeError, match=r"chosen has shape \[3, 2\]; need \[3, 1\]"):
        _native.choose_top(floats(3, 4), int32s(3), int64s(3, 2))
    with pytest.raises(ShapeError, match="query"):
        _native.attend_blocks(floats(17, 16), int64s(1), int32s(1), 16, floats(17, 16), floats(17))
    with pytest.raises(ShapeError, match="lse"):
        _native.attend_blocks(floats(2, 16), int64s(1), int32s(1), 16, floats(2, 16), floats(1))
    with pytest.raises(ShapeError, match="other_lse"):
        _native.merge_into(floats(2, 4), floats(2), floats(2, 4), floats(3))
    with pytest.raises(ShapeError, match="scores"):
        _native.score_blocks(LAYOUT, int64s(1), 0, 0, 0, 0, 2, floats(2, 16), 1.0, floats(2, 3))
    with pytest.raises(ShapeError, match="blocks 0 to 9 of level 0"):
        _native.score_blocks(LAYOUT, int64s(1), 0, 0, 0, 0, 9, floats(2, 16), 1.0, floats(2, 9))
    with pytest.raises(ShapeError, match="pieces is int32"):
        _native.read_seconds(int32s(1), 256, [0])
    with pytest.raises(ShapeError, match="buffer"):
        _native.read_rounds(CpuPool(1).native, floats(8), 8, 1)


def test_the_store_refuses_what_does_not_fit():
    payload = np.zeros((2, GEOMETRY.block_bytes), np.uint8)
    with pytest.raises(ShapeError, match="payload"):
        _native.ingest_blocks(LAYOUT, 0, 0, 0, 16, payload[:1])
    with pytest.raises(ShapeError, match="1024 bytes a head for 32 tokens"):
        _native.ingest_blocks(LAYOUT, 0, 0, 0, 32, payload)
    with pytest.raises(ShapeError, match="layer 2"):
        _native.ingest_blocks(LAYOUT, 0, 2, 0, 16, payload)
    rows = floats(1, 2, 16)
    with pytest.raises(ShapeError, match="tokens_in_slab"):
        _native.append_tokens(LAYOUT, int64s(1), int64s(2), 0, rows, rows, int32s(1))
    with pytest.raises(ShapeError, match="each row must be contiguous"):
        _native.append_tokens(
            LAYOUT, int64s(1), int64s(1), 0, rows, floats(1, 16, 2).transpose(0, 2, 1), int32s(1)
        )


def test_the_dense_part_refuses_what_does_not_fit():
    layers, pool = dense(), CpuPool(1).native
    with pytest.raises(ShapeError, match="embeddings"):
        layers.begin(pool, floats(1, 31), int64s(1), floats(1, layers.qkv_width), 0)
    layers.begin(pool, floats(1, 32), int64s(1), floats(1, layers.qkv_width), 0)
    with pytest.raises(ShapeError, match="attended"):
        layers.advance(pool, 0, floats(2, HEADS, 16), floats(1, 32), 0)
    with pytest.raises(ShapeError, match="hidden has shape"):
        layers.advance(pool, 0, floats(1, HEADS, 16), floats(1, layers.qkv_width), 0)
    with pytest.raises(ShapeError, match="logits"):
        layers.logits(pool, floats(1, 32), floats(1, 32), 0)


def test_weights_of_the_dense_part_live_as_long_as_it():
    frequencies, norm = floats(8), torch.zeros(32)
    kept = weakref.ref(norm)
    product = torch.zeros(3, 32, 16), torch.zeros(48)
    qkv = torch.zeros(8, 32, 16), torch.zeros(128)
    square = torch.zeros(2, 64, 16), torch.zeros(32)
    wide, down = (
        (torch.zeros(4, 32, 16), torch.zeros(64)),
        (torch.zeros(2, 32, 16), torch.zeros(32)),
    )
    layers = _native.DenseLayers(
        *(32, HEADS, 2, 16, 1e-5, frequencies, [[norm, norm]]),
        *([[qkv, square, wide, down]], norm, product),
    )
    del norm
    gc.collect()
    assert kept() is not None
    del layers
    gc.collect()
    assert kept() is None


def test_a_prompts_needs_refuse_what_does_not_fit():
    def needs(slabs: int = 1, regions: np.ndarray | None = None) -> _native.PromptNeeds:
        edges = int64s(3, 2) if regions is None else regions
        return _native.PromptNeeds(LAYOUT, int64s(slabs), 64, HEADS, edges, int32s(3, 4, 7), RADII)

    with pytest.raises(ShapeError, match="64 tokens in 0 slabs"):
        needs(slabs=0)
    with pytest.raises(ShapeError, match="regions"):
        needs(regions=int64s(3, 3))
    with pytest.raises(ShapeError, match="counts"):
        needs(regions=int64s(2, 2))
    with pytest.raises(ShapeError, match="query"):
        needs().begin_layer(0, floats(3, HEADS, 8))
    results = [floats(HEADS, 4, 8), *(floats(HEADS, 2) for _ in range(3)), floats(HEADS, 5)]
    with pytest.raises(ShapeError, match="kv has shape"):
        needs().finish_layer(*results)


def test_sampling_refuses_what_does_not_fit():
    sampler = _native.TokenSampler(0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0)
    with pytest.raises(ShapeError, match=r"logits has shape \[2, 9\]; need \[1, any\]"):
        _native.sample_rows(None, [sampler], floats(2, 9), 0)
    with pytest.raises(ShapeError, match="each row must be contiguous"):
        _native.sample_rows(None, [sampler], floats(1, 9)[:, ::2], 0)
    with pytest.raises(ShapeError, match="float64"):
        _native.choose_token(np.zeros(9), 1.0, 0, 1.0, 0.0, 0)


def test_planners_refuse_what_does_not_fit():
    planner = make_planner(2, HEADS, 2, 16, network=random_network(1)).native
    costs = [0.0] * 4
    with pytest.raises(ShapeError, match="priors"):
        _native.Planner(
            2, HEADS, 2, 16, floats(2, HEADS, 2), floats(2, HEADS), costs, costs, costs, RADII
        )
    with pytest.raises(ShapeError, match="profile"):
        _native.PlannerState(planner, floats(7))
    with pytest.raises(ShapeError, match="profiles"):
        planner.predict(floats(3, NUM_FEATURES), floats(3, 12))
    with pytest.raises(ShapeError, match="layer 2 of 2"):
        planner.select(floats(HEADS, 4, 8), 2, True, 0.1, int32s(2), int32s(HEADS))
    with pytest.raises(ShapeError, match="levels"):
        planner.select(floats(HEADS, 4, 8), 0, True, 0.1, int32s(3), int32s(HEADS))
    bare = make_planner(2, HEADS, 2, 16, network=None).native
    with pytest.raises(ShapeError, match="no network"):
        bare.predict(floats(3, NUM_FEATURES), floats(3, 11))


def test_attention_refuses_what_does_not_fit():
    pool = CpuPool(1).native
    with pytest.raises(ShapeError, match="sequences"):
        _native.LayerAttention(LAYOUT, int64s(1, 4), HEADS, [None])
    with pytest.raises(ShapeError, match="budgets"):
        _native.GivenPlans(int32s(2, 2), int32s(1, HEADS))
    query, output, lse = floats(1, HEADS, 16), floats(1, HEADS, 16), floats(1, HEADS)
    for name, arrays in (
        ("query", (floats(2, HEADS, 16), output, lse)),
        ("output", (query, floats(1, HEADS, 8), lse)),
        ("lse", (query, output, lse.astype(np.float64))),
    ):
        with pytest.raises(ShapeError, match=name):
            attention().submit(pool, 0, *arrays, 0)
    with pytest.raises(ShapeError, match="layer 2 of 2"):
        attention().submit(pool, 2, query, output, lse, 0)


def test_the_lane_and_the_driver_refuse_what_does_not_fit():
    words = (int64s(32), int64s(1), int64s(4))
    with pytest.raises(ShapeError, match=r"task has shape \[31\]"):
        _native.GpuLane(1, [(0, 0, int64s(31), *words[1:])], 1.0, 1.0, False)
    with pytest.raises(ShapeError, match="lse"):
        _native.StepDriver(LAYOUT, HEADS, *board(lse=floats(3, 3)), 1)
    with pytest.raises(ShapeError, match="planned is int64"):
        _native.StepDriver(LAYOUT, HEADS, *board(planned=int64s(2, 3, 2)), 1)
    driver, pool = _native.StepDriver(LAYOUT, HEADS, *board(), 1), CpuPool(1).native
    lists = (int64s(1), int64s(1), int32s(1))
    with pytest.raises(ShapeError, match="4 rows of 4 heads on a board for 3"):
        driver.run(pool, attention(4), None, False, 1, *lists, 0)
    with pytest.raises(ShapeError, match="tokens"):
        driver.run(pool, attention(), None, False, 1, int64s(1), int64s(2), int32s(1), 0)
    planner = make_planner(2, HEADS, 2, 16, network=None).native
    with pytest.raises(ShapeError, match="told"):
        _native.DevicePlans(driver, 0, planner, floats(1, HEADS, 2))
    with pytest.raises(ShapeError, match="row 3"):
        _native.DevicePlans(driver, 3, planner, floats(2, HEADS, 2))
