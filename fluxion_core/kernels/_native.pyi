"""The native module. Arrays are checked: dtype, shape, order, place; ShapeError says what is wrong.

NumPy's cost a call 0.1 us each; torch's are taken too where nothing is hot, at 3 us each.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

Floats = npt.NDArray[np.float32]
Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

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
def crc32c(data: Bytes, /) -> int: ...
def ingest_blocks(
    layout: SlabLayout,
    slab: int,
    layer: int,
    first_token: int,
    num_tokens: int,
    payload: Bytes,
    /,
) -> bool: ...
def append_tokens(
    layout: SlabLayout,
    slabs: Int64s,
    tokens_in_slab: Int64s,
    layer: int,
    key: Floats,
    value: Floats,
    first_not_finite: Int32s,
    /,
) -> None: ...
def score_blocks(
    layout: SlabLayout,
    slabs: Int64s,
    layer: int,
    kv_head: int,
    level: int,
    first_block: int,
    num_blocks: int,
    query: Floats,
    radius: float,
    scores: Floats,
    /,
) -> None: ...
def choose_top(scores: Floats, budgets: Int32s, chosen: Int64s, /) -> None: ...
def attend_blocks(
    query: Floats,
    addresses: Int64s,
    heads: Int32s,
    last_tokens: int,
    output: Floats,
    lse: Floats,
    /,
) -> None: ...
def merge_into(output_a: Floats, lse_a: Floats, output_b: Floats, lse_b: Floats, /) -> None: ...
def read_seconds(pieces: Int64s, piece_bytes: int, cpus: list[int], /) -> float: ...
def read_rounds(pool: TaskPool, buffer: Bytes, round_bytes: int, rounds: int, /) -> list[float]: ...
def score_seconds(
    digest_bits: int,
    query: Floats,
    records: Int64s,
    record_bytes: int,
    width: int,
    cpus: list[int],
    /,
) -> float: ...
def attend_seconds(query: Floats, blocks: Int64s, cpus: list[int], /) -> float: ...

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

def tls_missing() -> str:
    """Why there is no TLS for hand-offs' connections here; empty if there is."""

class IoThreads:
    """Threads that move the bytes of hand-offs; none takes the interpreter's lock.

    Close landings and departures first; connections that are left are closed with the threads.
    """

    def __init__(self, threads: int, cpus: Sequence[int] = (), niceness: int = 0) -> None: ...
    def close(self) -> None: ...
    def cpu_seconds(self) -> float: ...

PlaneFault = tuple[str, str, int, int, int, int]
"""(kind, text, layer, first_token, expected, found); see plane_fault.py."""

class KvLanding:
    """A prompt's KV on its way into slabs; see native/plane/kv_landing.h.

    `add` takes the descriptor over, also where it raises. `event_fd` is written when all is whole,
    when something is wrong, and every 50 ms while frames are taken in.
    """

    def __init__(
        self,
        threads: IoThreads,
        layout: SlabLayout,
        *,
        slabs: Int64s,
        num_tokens: int,
        kv_from_token: int,
        event_fd: int,
    ) -> None: ...
    def add(
        self,
        fd: int,
        transport: str,
        connection: int,
        of: int,
        psk: bytes = ...,
        identity: bytes = ...,
    ) -> None: ...
    def state(self) -> tuple[int, int, int, int, bool, PlaneFault | None]:
        """(payload_bytes, chunks, tokens_taken, received_bytes, is_whole, fault)."""
    @property
    def whole_tokens(self) -> int:
        """Tokens, from the prompt's first, that are written in every layer."""
    def close(self) -> None: ...

class KvDeparture:
    """A prompt's KV on its way out; see native/plane/kv_departure.h.

    `add` takes the descriptor over, also where it raises. A payload, an address or an array, must
    stay until `state` names its number or `close` has returned. `event_fd` is written when frames
    are finished and when something is wrong.
    """

    def __init__(
        self, threads: IoThreads, *, event_fd: int, slots: int = 0, slot_bytes: int = 0
    ) -> None: ...
    def add(
        self,
        fd: int,
        transport: str,
        connection: int,
        of: int,
        psk: bytes = ...,
        identity: bytes = ...,
    ) -> None: ...
    def put(
        self, layer: int, first_token: int, num_tokens: int, payload: int | Bytes, num_bytes: int
    ) -> int: ...
    def state(self) -> tuple[list[int], int, float, PlaneFault | None]:
        """(numbers finished since the last call, their bytes so far, seconds since anything moved
        while frames wait, fault)."""
    def close(self) -> None: ...

def feature_names() -> list[str]: ...

class Planner:
    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        priors: Floats,
        head_weights: Floats,
        scan_costs: Sequence[float],
        spreads: Sequence[float],
        largest_costs: Sequence[float],
        radii: Sequence[float],
        /,
    ) -> None: ...
    def set_network(
        self,
        standards: Sequence[Tensor],
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        /,
    ) -> None: ...
    def features(
        self,
        state: PlannerState,
        layer: int,
        region_tokens: int,
        query: Floats,
        sights: Floats,
        bounds: Floats,
        features: Floats,
        /,
    ) -> None: ...
    def predict(self, features: Floats, profiles: Floats, /) -> None: ...
    def select(
        self,
        log_squares: Floats,
        layer: int,
        by_price: bool,
        number: float,
        levels: Int32s,
        budgets: Int32s,
        /,
    ) -> None: ...

class PlannerState:
    def __init__(self, planner: Planner, profile: Floats, /) -> None: ...
    def remember(self, layer: int, query: Floats, seen: Floats, /) -> None: ...

class PlanSource:
    """Where one row's plans come from in one step; see plan/plan_source.h."""

class GivenPlans(PlanSource):
    """Levels [layers or 1, kv_heads] and budgets [layers or 1, heads], both int32 and copied.

    Args:
        ranker: whose radii rank blocks; None: by Quest's bounds.
        expected: as the budgets, of float32: see `LayerAttention.expected`. Copied.
    """

    def __init__(
        self,
        levels: Int32s,
        budgets: Int32s,
        ranker: Planner | None = None,
        expected: Floats | None = None,
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

    def __init__(self, driver: StepDriver, row: int, planner: Planner, told: Floats, /) -> None: ...

class ReplayedPlans(PlanSource):
    """For measurements: given plans in place of another source's, which are made all the same."""

    def __init__(
        self,
        levels: Int32s,
        budgets: Int32s,
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
        sequences: Int64s,
        heads: int,
        sources: Sequence[PlanSource | None],
        /,
    ) -> None: ...
    def may_read(self, layer: int, /) -> bool: ...
    def write_given_plans(self, levels: Int32s, budgets: Int32s, radii: Floats, /) -> None:
        """Write plans that are known before the step, for a device that chooses.

        Rows without one, whose plans another device makes and those beyond the batch read nothing.

        Args:
            levels: [layers, capacity, kv_heads].
            budgets: [layers, capacity, heads].
            radii: [capacity, 4], of each row's scores at each block size.

        Raises:
            ValueError: a row's plans are made on this machine's pool, layer by layer.
        """
    def submit(
        self,
        pool: TaskPool,
        layer: int,
        query: Floats,
        output: Floats,
        lse: Floats,
        wake_bytes: int,
        /,
        lists: tuple[Int32s, Int32s, Int32s] | None = None,
    ) -> None:
        """Start a layer on the pool, which holds on to the arrays until its `wait` returns.

        Args:
            lists: units and masks, both [rows, kv_heads, room], and how many [rows, kv_heads]: what
                is read of each row with a region (attention/device_lists.h), in place of a choice.
                Output and lse of a group with an empty list are left as they are.

        Raises:
            ValueError: lists go with these rows' plans or windows; or units that do not ascend in
                their row's region, masks of heads that there are not.
        """
    def count_selected(self, counts: Int32s, /) -> None:
        """Count what a device selected in a step with lists.

        Args:
            counts: [layers, capacity, kv_heads, 2] units of each group, as in tier/constants.py.
        """
    def finish_layer(self) -> None: ...
    def plan(self, sequence: int, kv_head: int, /) -> tuple[int, list[int]]: ...
    def expected(self, sequence: int, kv_head: int, /) -> list[float] | None:
        """Log of the squared head output error that the last layer's plan was made with, of each
        head of a group; -inf of one that reads everything. None where nothing is predicted."""
    def group_counts(self, sequence: int, /) -> tuple[tuple[int, ...], int, int, int, int]: ...
    def plan_nanoseconds(self) -> tuple[int, int, int]: ...
    def read_bytes(self, sequence: int, /) -> tuple[int, int, int, int]:
        """Of a row: scanned, attended, scanned for plans, attended in a device's own memory."""
    def runs(self, sequence: int, kv_head: int, /) -> list[tuple[int, int, int, int]]: ...

class PromptNeeds:
    def __init__(
        self,
        layout: SlabLayout,
        slabs: Int64s,
        num_tokens: int,
        last_rows: int,
        heads: int,
        positions: Int64s,
        regions: Int64s,
        counts: Int32s,
        radii: Sequence[float],
        /,
    ) -> None: ...
    @property
    def num_tiles(self) -> int: ...
    def begin_layer(self, layer: int, query: Floats, /) -> None: ...
    def advance(self, pool: TaskPool, work: int, wake_bytes: int, /) -> int: ...
    def finish_layer(
        self,
        log_squares: Floats,
        worst_log_squares: Floats,
        region_mass: Floats,
        bounds: Floats,
        kv: Floats,
        spread_log_squares: Floats,
        /,
    ) -> None: ...

class DenseLayers:
    def __init__(
        self,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        norm_epsilon: float,
        frequencies: Floats,
        norms: Sequence[Sequence[Tensor]],
        products: Sequence[Sequence[tuple[Tensor, Tensor]]],
        final_norm: Tensor,
        head: tuple[Tensor, Tensor],
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
        embeddings: Floats,
        positions: Int64s,
        qkv: Floats,
        wake_bytes: int,
        /,
    ) -> None: ...
    def advance(
        self, pool: TaskPool, layer: int, attended: Floats, to: Floats, wake_bytes: int, /
    ) -> None: ...
    def logits(self, pool: TaskPool, hidden: Floats, to: Floats, wake_bytes: int, /) -> None: ...

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
    logits: Floats,
    wake_bytes: int,
) -> list[tuple[int, float]]: ...
def choose_token(
    logits: Floats,
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
        runners: Sequence[tuple[int, int, Int64s, Int64s, Int64s]],
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
        heads: int,
        published: Int32s,
        answered: Int32s,
        skip: Int32s,
        rows: Floats,
        output: Floats,
        lse: Floats,
        device_queries: int,
        planned: Int32s,
        plan_levels: Int32s,
        plan_budgets: Int32s,
        timeout_ns: int,
        /,
        tier: tuple[Int32s, Int32s, Int32s, Int32s, int, int] | None = None,
    ) -> None:
        """See StepBoard in lane/step_driver.h.

        Args:
            tier: of a GPU that lists what the host is to read, see TierBoard: flags and counts,
                both [layers, capacity, kv_heads], units and masks, both [capacity, kv_heads, room];
                addresses of the same units and masks on the device, 0 without a lane.
        """
    def run(
        self,
        pool: TaskPool,
        attention: LayerAttention,
        lane: GpuLane | None,
        alone: bool,
        step: int,
        slabs: Int64s,
        tokens: Int64s,
        first_not_finite: Int32s,
        wake_bytes: int,
        /,
    ) -> None: ...
