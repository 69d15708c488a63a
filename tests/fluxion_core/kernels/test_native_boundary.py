"""What the native module refuses, by group of its functions: it reads no array that does not fit.

A wrong dtype, shape, order or device is a ShapeError that names the array; what is no array, or may
not be written, is a TypeError.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

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
    with pytest.raises(ShapeError, match="data is float32"):
        _native.crc32c(floats(2))
    with pytest.raises(ShapeError, match="data"):
        _native.crc32c(payload[0, ::2])
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
    def needs(
        slabs: int = 1, regions: np.ndarray | None = None, *, last_rows: int = 2, position: int = 0
    ) -> _native.PromptNeeds:
        edges = int64s(3, 2) if regions is None else regions
        tokens = int64s(len(edges)) + position
        counts = int32s(3, 4, 7)
        return _native.PromptNeeds(
            LAYOUT, int64s(slabs), 64, last_rows, HEADS, tokens, edges, counts, RADII
        )

    with pytest.raises(ShapeError, match="64 tokens in 0 slabs"):
        needs(slabs=0)
    with pytest.raises(ShapeError, match="regions"):
        needs(regions=int64s(3, 3))
    with pytest.raises(ShapeError, match="counts"):
        needs(regions=int64s(2, 2))
    with pytest.raises(ShapeError, match="query"):
        needs().begin_layer(0, floats(3, HEADS, 8))
    for last_rows in (0, 4):
        with pytest.raises(ValueError, match="last tokens"):
            needs(last_rows=last_rows)
    for position in (-1, 64):
        with pytest.raises(ValueError, match="a query of the prompt"):
            needs(position=position)
    results = [
        floats(HEADS, 4, 8),
        *(floats(HEADS, 2) for _ in range(3)),
        floats(HEADS, 5),
        floats(HEADS, 4, 8),
    ]
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


def given(*, layers: int = 1, kv_heads: int = 2, heads: int = HEADS) -> _native.GivenPlans:
    return _native.GivenPlans(int32s(layers, kv_heads), int32s(layers, heads))


class StoredSequence:
    """300 tokens of zeros, of which 128 to 255 are the region."""

    def __init__(self) -> None:
        slab_bytes = LAYOUT.slab_bytes
        self.memory = np.zeros(3 * slab_bytes, np.uint8)
        first = self.memory.ctypes.data
        self.table = np.array([first + i * slab_bytes for i in range(3)], np.int64)

    def view(self, begin: int = 128, end: int = 256, tokens: int = 300) -> list[int]:
        return [self.table.ctypes.data, tokens, begin, end, 1]

    def attention(
        self, *sources: _native.PlanSource, view: list[int] | None = None
    ) -> _native.LayerAttention:
        views = np.array([view or self.view()] * len(sources), np.int64)
        return _native.LayerAttention(LAYOUT, views, HEADS, sources)


@pytest.mark.parametrize(
    "wrong", [{"kv_heads": 1}, {"heads": 2}, {"heads": 8}, {"layers": 3}], ids=str
)
def test_plans_of_a_model_of_another_shape_are_refused(wrong: dict[str, int]):
    stored = StoredSequence()
    plans = given(**wrong)
    recorder = _native.PlanRecorder(given(), wrong.get("kv_heads", 2), wrong.get("heads", 5))
    levels = int32s(wrong.get("layers", 1), wrong.get("kv_heads", 2))
    budgets = int32s(wrong.get("layers", 1), wrong.get("heads", HEADS))
    for source in (plans, recorder, _native.ReplayedPlans(levels, budgets)):
        with pytest.raises(ValueError, match="another shape"):
            stored.attention(source)
    with pytest.raises(ValueError, match="another shape"):
        stored.attention(_native.ReplayedPlans(int32s(1, 2), int32s(1, HEADS), plans))


@pytest.mark.parametrize("level", [-3, 4, 77])
def test_a_plan_has_a_level_that_there_is_and_no_budget_below_0(level: int):
    with pytest.raises(ValueError, match="level that there is not"):
        _native.GivenPlans(int32s(1, 2) + level, int32s(1, HEADS))
    with pytest.raises(ValueError, match="below 0"):
        _native.GivenPlans(int32s(1, 2), int32s(1, HEADS) - 1)


def test_predicted_plans_have_a_network_and_one_row_of_one_step():
    stored = StoredSequence()

    def planner_of(layers: int, heads: int, seed: int | None) -> _native.Planner:
        network = None if seed is None else random_network(seed)
        return make_planner(layers, heads, 2, 16, network=network).native

    def state_of(planner: _native.Planner, layers: int = 2, heads: int = HEADS):
        return _native.PlannerState(planner, floats(layers * (heads * 70 + 10)))

    planner, bare, deep = (
        planner_of(2, HEADS, 0),
        planner_of(2, HEADS, None),
        planner_of(3, HEADS, 0),
    )
    with pytest.raises(ValueError, match="no network"):
        _native.PredictedPlans(bare, state_of(bare), True, 0.1)
    with pytest.raises(ValueError, match="another shape than the planner"):
        _native.PredictedPlans(planner, state_of(deep, layers=3), True, 0.1)
    with pytest.raises(ValueError, match="another shape"):
        stored.attention(_native.PredictedPlans(deep, state_of(deep, layers=3), True, 0.1))
    state = state_of(planner)
    source = _native.PredictedPlans(planner, state, True, 0.1)
    first = stored.attention(source)
    for again in (source, _native.PlanRecorder(source, 2, HEADS)):
        with pytest.raises(ValueError, match="begins once"):
            stored.attention(again)
    with pytest.raises(ValueError, match="share a planner's state"):
        stored.attention(*(_native.PredictedPlans(planner, state, True, 0.1) for _ in range(2)))
    other = planner_of(2, HEADS, 1)
    with pytest.raises(ValueError, match="one planner"):
        stored.attention(
            _native.PredictedPlans(planner, state, True, 0.1),
            _native.PredictedPlans(other, state_of(other), True, 0.1),
        )
    del first


@pytest.mark.parametrize("region", [(128, 512), (-128, 256), (120, 256), (128, 250)], ids=str)
def test_a_region_is_of_whole_blocks_of_its_sequence(region: tuple[int, int]):
    stored = StoredSequence()
    with pytest.raises(ValueError, match=r"whole blocks of its sequence|below 0"):
        stored.attention(given(), view=stored.view(*region))
    with pytest.raises(ValueError, match="without a table"):
        stored.attention(given(), view=[0, 300, 128, 256, 1])


def test_nothing_is_said_of_rows_and_layers_that_there_are_not():
    stored, pool = StoredSequence(), CpuPool(1).native
    tasks = stored.attention(given())
    for ask in (lambda: tasks.plan(0, 0), lambda: tasks.runs(0, 0), tasks.finish_layer):
        with pytest.raises(ShapeError, match="no layer has been submitted"):
            ask()
    tasks.submit(pool, 0, floats(1, HEADS, 16), floats(1, HEADS, 16), floats(1, HEADS), 0)
    pool.wait()
    for row, kv_head in ((1, 0), (-1, 0), (0, 2), (0, -1)):
        for ask_task in (tasks.plan, tasks.runs):
            with pytest.raises(ShapeError, match=r"row|KV head"):
                ask_task(row, kv_head)
    for row in (-1, 1):
        for ask_row in (tasks.read_bytes, tasks.group_counts):
            with pytest.raises(ShapeError, match="row"):
                ask_row(row)
    for layer in (-1, 2):
        with pytest.raises(ShapeError, match="layer"):
            tasks.may_read(layer)
        with pytest.raises(ShapeError, match="layer"):
            given(layers=2).plan(layer)
    with pytest.raises(ShapeError, match="layer"):
        given().plan(-1)


def test_what_a_round_needs_lives_until_it_was_waited_for():
    stored, pool = StoredSequence(), CpuPool(1).native
    query, output, lse = floats(1, HEADS, 16), floats(1, HEADS, 16), floats(1, HEADS)
    alive = weakref.ref(output)
    tasks = stored.attention(given())
    tasks.submit(pool, 0, query, output, lse, 1 << 40)
    with pytest.raises(RuntimeError, match="not waited for"):
        tasks.submit(pool, 0, query, output, lse, 1 << 40)
    del tasks, query, output, lse
    gc.collect()
    assert alive() is not None
    pool.wait()
    gc.collect()
    assert alive() is None


def test_slabs_and_places_in_them_are_of_the_stores_shape():
    for sizes in ((0, 2, 16, 512, 16), (2, 0, 16, 512, 16), (2, 2, 16, 0, 16)):
        with pytest.raises(ValueError, match="slab"):
            _native.SlabLayout(*sizes)
    for tokens, bits in ((384, 16), (128, 8)):
        with pytest.raises(ValueError, match="power of two"):
            _native.SlabLayout(2, 2, 16, tokens, bits)
    with pytest.raises(ValueError, match="digest_bits"):
        _native.SlabLayout(2, 2, 16, 512, 3)
    key, stored = floats(1, 2, 16), StoredSequence()
    for place in (-1, 128):
        with pytest.raises(ShapeError, match="token in slab"):
            _native.append_tokens(
                LAYOUT, stored.table[:1], int64s(1) + place, 0, key, key, int32s(1)
            )


def test_the_lane_and_the_driver_refuse_what_does_not_fit():
    with pytest.raises(ShapeError, match=r"task has shape \[63\]; need \[64\]"):
        _native.GpuLane(1, [(0, 0, int64s(63), int64s(1), int64s(4))], 1.0, 1.0, False)
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
    deeper = make_planner(3, HEADS, 2, 16, network=None).native
    with pytest.raises(ValueError, match="another shape"):
        _native.DevicePlans(driver, 0, deeper, floats(3, HEADS, 2))
    deep = native_layout(replace(GEOMETRY, num_layers=3))
    other = _native.LayerAttention(deep, int64s(1, 5), HEADS, [None])
    with pytest.raises(ShapeError, match="other shapes"):
        driver.run(pool, other, None, False, 1, *lists, 0)
    with pytest.raises(ShapeError, match="token in slab"):
        driver.run(pool, attention(), None, False, 1, int64s(1), int64s(1) - 1, int32s(1), 0)
    with pytest.raises(ShapeError, match="row 3"):
        _native.DevicePlans(driver, 3, planner, floats(2, HEADS, 2))


def test_a_board_with_lists_refuses_what_does_not_fit():
    good = {
        "listed": int32s(2, 3, 2),
        "list_counts": int32s(2, 3, 2),
        "list_units": int32s(3, 2, 8),
        "list_masks": int32s(3, 2, 8),
    }
    _native.StepDriver(LAYOUT, HEADS, *board(), 1, tier=(*good.values(), 0, 0))
    for name, wrong in (
        ("listed", int32s(2, 3, 1)),
        ("list_counts", int64s(2, 3, 2)),
        ("list_units", int32s(4, 2, 8)),
        ("list_masks", int32s(3, 2, 7)),
    ):
        tier = (*(good | {name: wrong}).values(), 0, 0)
        with pytest.raises(ShapeError, match=name):
            _native.StepDriver(LAYOUT, HEADS, *board(), 1, tier=tier)
    with pytest.raises(TypeError):
        _native.StepDriver(LAYOUT, HEADS, *board(), 1, tier=tuple(good.values()))


def test_a_driver_keeps_the_lists_of_its_board():
    listed = int32s(2, 3, 2)
    alive = weakref.ref(listed)
    tier = (listed, int32s(2, 3, 2), int32s(3, 2, 8), int32s(3, 2, 8), 0, 0)
    driver = _native.StepDriver(LAYOUT, HEADS, *board(), 1, tier=tier)
    del listed, tier
    gc.collect()
    assert alive() is not None
    del driver
    gc.collect()
    assert alive() is None


def submit_lists(
    units: np.ndarray, masks: np.ndarray, counts: np.ndarray, *, attends_rest: int = 0
) -> None:
    """Lists for one row, whose region is units 8 to 15."""
    stored, pool = StoredSequence(), CpuPool(1)
    tasks = stored.attention(given(), view=[*stored.view()[:4], attends_rest])
    arrays = floats(1, HEADS, 16), floats(1, HEADS, 16), floats(1, HEADS)
    tasks.submit(pool.native, 0, *arrays, 0, lists=(units, masks, counts))
    pool.wait()


def test_lists_refuse_what_does_not_fit():
    units = int32s(1, 2, 4) + np.arange(9, 13, dtype=np.int32)
    masks, counts = int32s(1, 2, 4) + 3, int32s(1, 2) + 4
    submit_lists(units, masks, counts)
    with pytest.raises(ShapeError, match="list_units is int64"):
        submit_lists(units.astype(np.int64), masks, counts)
    with pytest.raises(ShapeError, match=r"list_masks has shape \[1, 2, 3\]; need \[1, 2, 4\]"):
        submit_lists(units, int32s(1, 2, 3), counts)
    with pytest.raises(ShapeError, match="list_counts"):
        submit_lists(units, masks, int32s(2, 2))
    for count in (5, -1):
        with pytest.raises(ShapeError, match=f"a list of {count} units in room for 4"):
            submit_lists(units, masks, int32s(1, 2) + count)
    for of_list in ([9, 9, 10, 11], [7, 9, 10, 11], [9, 10, 11, 16], [-1, 9, 10, 11]):
        with pytest.raises(ValueError, match="units ascend, inside their row's region"):
            submit_lists(int32s(1, 2, 4) + np.array(of_list, np.int32), masks, counts)
    for mask in (0, 4, -1):
        with pytest.raises(ValueError, match="masks are of heads of their group"):
            submit_lists(units, int32s(1, 2, 4) + mask, counts)
    with pytest.raises(ValueError, match="window attended to by who made them"):
        submit_lists(units, masks, counts, attends_rest=1)


def test_plans_and_counts_for_a_device_have_room_for_all_rows():
    tasks = attention(2)
    levels, budgets, radii = int32s(2, 3, 2), int32s(2, 3, HEADS), floats(3, 4)
    tasks.write_given_plans(levels, budgets, radii)
    with pytest.raises(ShapeError, match="levels has room for 1 rows of 2"):
        tasks.write_given_plans(levels[:, :1].copy(), budgets, radii)
    with pytest.raises(ShapeError, match="levels"):
        tasks.write_given_plans(int32s(1, 3, 2), budgets, radii)
    with pytest.raises(ShapeError, match="budgets"):
        tasks.write_given_plans(levels, int32s(2, 2, HEADS), radii)
    with pytest.raises(ShapeError, match="radii"):
        tasks.write_given_plans(levels, budgets, floats(3, 3))
    with pytest.raises(TypeError):
        tasks.write_given_plans(read_only(int32s(2, 3, 2)), budgets, radii)
    tasks.count_selected(int32s(2, 2, 2, 2))
    with pytest.raises(ShapeError, match="counts has room for 1 rows of 2"):
        tasks.count_selected(int32s(2, 1, 2, 2))
    with pytest.raises(ShapeError, match="counts"):
        tasks.count_selected(int32s(2, 2, 2, 1))
