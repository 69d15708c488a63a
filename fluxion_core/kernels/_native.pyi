"""The native module. Arguments are addresses and sizes; cpu.py of each operation checks them."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

class SlabLayout:
    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        slab_tokens: int,
        digest_bits: int,
    ) -> None: ...
    @property
    def slab_bytes(self) -> int: ...

def isa() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def ingest_blocks(
    layout: SlabLayout,
    slab: int,
    layer: int,
    first_token: int,
    num_tokens: int,
    payload: int,
    payload_head_bytes: int,
    /,
) -> bool: ...
def append_tokens(
    layout: SlabLayout,
    slabs: int,
    tokens_in_slab: int,
    batch: int,
    layer: int,
    key: int,
    key_stride: int,
    value: int,
    value_stride: int,
    first_not_finite: int,
    /,
) -> None: ...
def score_blocks(
    layout: SlabLayout,
    slabs: int,
    layer: int,
    kv_head: int,
    level: int,
    first_block: int,
    num_blocks: int,
    query: int,
    group: int,
    radius: float,
    scores: int,
    /,
) -> None: ...
def choose_top(scores: int, rows: int, count: int, budgets: int, chosen: int, /) -> None: ...
def attend_blocks(
    head_dim: int,
    query: int,
    group: int,
    addresses: int,
    heads: int,
    num_blocks: int,
    last_tokens: int,
    output: int,
    lse: int,
    /,
) -> None: ...
def merge_into(
    output_a: int, lse_a: int, output_b: int, lse_b: int, rows: int, head_dim: int, /
) -> None: ...
def read_seconds(pieces: int, num_pieces: int, piece_bytes: int, cpus: list[int], /) -> float: ...
def read_rounds(
    pool: TaskPool, buffer: int, buffer_bytes: int, round_bytes: int, rounds: int, /
) -> list[float]: ...
def score_seconds(
    digest_bits: int,
    query: int,
    group: int,
    head_dim: int,
    records: int,
    num_records: int,
    record_bytes: int,
    width: int,
    cpus: list[int],
    /,
) -> float: ...
def attend_seconds(
    query: int, group: int, head_dim: int, blocks: int, num_blocks: int, cpus: list[int], /
) -> float: ...

class TaskPool:
    def __init__(
        self, cpus: list[int], max_helpers: int, spin_ns: int, strikes: int = ...
    ) -> None: ...
    @property
    def num_workers(self) -> int: ...
    @property
    def stalls(self) -> int: ...
    @property
    def num_left_out(self) -> int: ...
    def set_max_helpers(self, count: int, /) -> None: ...
    def wait(self) -> None: ...
    def claim(self, least: int = 0, most: int = ...) -> int: ...
    def complete(self, task: int, /) -> None: ...
    def set_tracing(self, on: bool, /) -> None: ...
    def take_trace(self) -> bytes: ...

def feature_names() -> list[str]: ...

class Planner:
    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        priors: int,
        head_weights: int,
        scan_costs: Sequence[float],
        spreads: Sequence[float],
        largest_costs: Sequence[float],
        radii: Sequence[float],
        /,
    ) -> None: ...
    def set_network(
        self,
        hidden: int,
        standards: Sequence[int],
        weights: Sequence[int],
        biases: Sequence[int],
        /,
    ) -> None: ...
    def features(
        self,
        state: PlannerState,
        layer: int,
        region_tokens: int,
        query: int,
        sights: int,
        bounds: int,
        num_blocks: int,
        features: int,
        /,
    ) -> None: ...
    def predict(self, features: int, rows: int, profiles: int, /) -> None: ...
    def select(
        self,
        log_squares: int,
        layer: int,
        by_price: bool,
        number: float,
        levels: int,
        budgets: int,
        /,
    ) -> None: ...

class PlannerState:
    def __init__(self, planner: Planner, profile: int, /) -> None: ...
    def remember(self, layer: int, query: int, seen: int, /) -> None: ...

class PlanSource:
    """Where one row's plans come from in one step; see plan/plan_source.h."""

class GivenPlans(PlanSource):
    """Levels [layers or 1, kv_heads] and budgets [layers or 1, heads], both int32 and copied."""

    def __init__(
        self,
        levels: npt.NDArray[np.int32],
        budgets: npt.NDArray[np.int32],
        ranker: Planner | None = None,
    ) -> None: ...
    def plan(self, layer: int, /) -> tuple[list[int], list[int]]:
        """Levels [kv_heads] and budgets [heads] of a layer."""

class PredictedPlans(PlanSource):
    """Made by a planner's network on the pool, layer by layer."""

    def __init__(
        self, planner: Planner, state: PlannerState, by_price: bool, number: float, /
    ) -> None: ...

class DevicePlans(PlanSource):
    """Announced by a GPU on the driver's board, layer by layer."""

    def __init__(
        self, driver: StepDriver, row: int, planner: Planner, told: int, told_stride: int, /
    ) -> None: ...

class ReplayedPlans(PlanSource):
    """For measurements: given plans in place of another source's, which are made all the same."""

    def __init__(
        self,
        levels: npt.NDArray[np.int32],
        budgets: npt.NDArray[np.int32],
        behind: PlanSource | None = None,
    ) -> None: ...

class PlanRecorder(PlanSource):
    """For measurements: another source's plans, kept."""

    def __init__(self, of: PlanSource, kv_heads: int, heads: int) -> None: ...
    @property
    def levels(self) -> list[int]:
        """[layers * kv_heads], of the layers that were asked for."""
    @property
    def budgets(self) -> list[int]:
        """[layers * heads]."""

class LayerAttention:
    def __init__(
        self,
        layout: SlabLayout,
        sequences: npt.NDArray[np.int64],
        heads: int,
        sources: Sequence[PlanSource | None],
        /,
    ) -> None: ...
    def may_read(self, layer: int, /) -> bool: ...
    def submit(
        self,
        pool: TaskPool,
        layer: int,
        query: int,
        query_stride: int,
        output: int,
        lse: int,
        wake_bytes: int,
        /,
    ) -> None: ...
    def finish_layer(self) -> None: ...
    def plan(self, sequence: int, kv_head: int, /) -> tuple[int, list[int]]: ...
    def group_counts(self, sequence: int, /) -> tuple[tuple[int, ...], int, int, int, int]: ...
    def plan_nanoseconds(self) -> tuple[int, int, int]: ...
    def read_bytes(self, sequence: int, /) -> tuple[int, int, int]: ...
    def runs(self, sequence: int, kv_head: int, /) -> list[tuple[int, int, int, int]]: ...

class PromptNeeds:
    def __init__(
        self,
        layout: SlabLayout,
        slabs: int,
        num_tokens: int,
        rows: int,
        heads: int,
        regions: int,
        counts: int,
        radii: Sequence[float],
        /,
    ) -> None: ...
    @property
    def num_tiles(self) -> int: ...
    def begin_layer(self, layer: int, query: int, /) -> None: ...
    def advance(self, pool: TaskPool, work: int, wake_bytes: int, /) -> int: ...
    def finish_layer(self, results: Sequence[int], /) -> None: ...

class DenseLayers:
    def __init__(
        self,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        norm_epsilon: float,
        frequencies: int,
        norms: Sequence[Sequence[int]],
        products: Sequence[Sequence[Sequence[int]]],
        final_norm: int,
        head: Sequence[int],
        /,
    ) -> None: ...
    @property
    def hidden_width(self) -> int: ...
    @property
    def qkv_width(self) -> int: ...
    @property
    def logits_width(self) -> int: ...
    def begin(
        self,
        pool: TaskPool,
        rows: int,
        embeddings: int,
        positions: int,
        qkv: int,
        wake_bytes: int,
        /,
    ) -> None: ...
    def advance(
        self, pool: TaskPool, layer: int, attended: int, to: int, wake_bytes: int, /
    ) -> None: ...
    def logits(
        self, pool: TaskPool, rows: int, hidden: int, to: int, wake_bytes: int, /
    ) -> None: ...

class TokenSampler:
    def __init__(
        self,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition_penalty: float,
        presence_penalty: float,
        frequency_penalty: float,
        seed: int,
        /,
    ) -> None: ...
    def see(self, token_ids: Sequence[int], /) -> None: ...
    def take(self, token_ids: Sequence[int], /) -> None: ...
    def set_position(self, position: int, /) -> None: ...

def sample_rows(
    pool: TaskPool | None,
    samplers: Sequence[TokenSampler],
    logits: int,
    row_stride: int,
    vocab: int,
    wake_bytes: int,
) -> list[tuple[int, float]]: ...
def choose_token(
    logits: int,
    vocab: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    noise: int,
    /,
) -> tuple[int, float]: ...

class GpuLane:
    def __init__(
        self,
        launch: int,
        slots: Sequence[Sequence[int]],
        gpu_rate: float,
        cpu_rate: float,
        has_digests: bool,
        /,
    ) -> None: ...
    def spans(self) -> bytes: ...

class StepDriver:
    def __init__(
        self,
        layout: SlabLayout,
        layers: int,
        capacity: int,
        heads: int,
        board: Sequence[int],
        timeout_ns: int,
        /,
    ) -> None: ...
    def run(
        self,
        pool: TaskPool,
        attention: LayerAttention,
        lane: GpuLane | None,
        alone: bool,
        batch: int,
        step: int,
        slabs: int,
        tokens: int,
        first_not_finite: int,
        wake_bytes: int,
        /,
    ) -> None: ...
