"""The hand-over of a layer: what is published beside the attention to the windows, what is waited
for, what is merged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import WindowSpec
from fluxion_core.kernels.dense_attention.triton import WindowAttention, WindowStates
from fluxion_core.kernels.handover import reference
from fluxion_core.kernels.handover.launch import Handover, Publication

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WINDOW = WindowSpec(sink_tokens=16, recent_tokens=128)
STEP = 7


def pinned(*shape: int, dtype: torch.dtype, value: float = 0) -> Tensor:
    """Memory that both sides see."""
    made = torch.full(shape, value, dtype=dtype)
    return made.pin_memory() if DEVICE.type == "cuda" else made


def on_device(values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def settle() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@dataclass
class Published:
    """One layer's queries, keys and values, and everywhere that they go."""

    attention: WindowAttention
    lengths: list[int]
    slots: list[int]
    flag_dtype: torch.dtype = torch.int64
    before: float = 1000.0
    """In the windows."""
    rows: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        shape, num_rows = self.attention, len(self.lengths)
        generator = torch.Generator().manual_seed(shape.num_heads)
        self.query, self.key, self.value = (
            torch.randn(num_rows, heads, shape.head_dim, generator=generator).bfloat16()
            for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        )
        slots = (max(self.slots) + 1, shape.num_kv_heads, WINDOW.slot_tokens, shape.head_dim)
        self.window_key, self.window_value = torch.full(
            (2, *slots), self.before, dtype=torch.bfloat16, device=DEVICE
        )
        self.device_query = torch.full(
            (num_rows, shape.num_heads, shape.head_dim), math.nan, device=DEVICE
        )
        floats = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        self.host_rows = pinned(num_rows, floats, dtype=torch.float32, value=math.nan)
        self.flags = pinned(num_rows, dtype=self.flag_dtype)
        self.stamp = on_device([-1], torch.int64)
        # As a fused projection leaves them: parts of wider rows.
        fused = torch.cat([part.flatten(1) for part in (self.query, self.key, self.value)], dim=1)
        views = fused.to(DEVICE).split(
            [part.flatten(1).shape[1] for part in (self.query, self.key, self.value)], dim=1
        )
        query, key, value = (view.unflatten(1, (-1, shape.head_dim)) for view in views)
        publication = Publication(
            key,
            value,
            self.device_query,
            self.host_rows,
            self.flags,
            on_device([STEP]),
            self.stamp,
        )
        self.states = self.attend(query, publication)
        settle()

    def attend(self, query: Tensor, publication: Publication | None) -> WindowStates:
        states = self.attention.make_states(len(self.lengths), DEVICE)
        windows = self.window_key, self.window_value
        rows = on_device(self.slots), on_device(self.lengths)
        self.attention.launch(query, *windows, *rows, states, publication)
        return states


@pytest.mark.parametrize("flag_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 64), (8, 1, 128), (14, 2, 128)]
)
def test_every_row_reaches_the_host_the_window_and_the_other_kernels(
    heads: int, kv_heads: int, head_dim: int, flag_dtype: torch.dtype
):
    attention = WindowAttention(WINDOW, heads, kv_heads, head_dim)
    made = Published(attention, lengths=[1, 17, 333], slots=[2, 0, 3], flag_dtype=flag_dtype)
    assert torch.equal(made.device_query.cpu(), made.query.float())
    parts = [part.flatten(1).float() for part in (made.query, made.key, made.value)]
    assert torch.equal(made.host_rows, torch.cat(parts, dim=1))
    assert made.flags.tolist() == [STEP] * 3
    assert made.stamp.item() > 0
    for row, (length, slot) in enumerate(zip(made.lengths, made.slots, strict=True)):
        entry = WINDOW.slot_index(length - 1)
        assert torch.equal(made.window_key[slot, :, entry].cpu(), made.key[row])
        assert torch.equal(made.window_value[slot, :, entry].cpu(), made.value[row])
    # Nothing else of the window was touched.
    written = len(made.lengths) * kv_heads * head_dim
    assert (made.window_key != 1000).sum().item() == written
    assert (made.window_value != 1000).sum().item() == written


def test_a_padding_row_publishes_nothing():
    made = Published(WindowAttention(WINDOW, 4, 2, 64), lengths=[0, 40, 0], slots=[0, 1, 0])
    assert made.flags.tolist() == [0, STEP, 0]
    assert made.host_rows[::2].isnan().all()
    assert made.device_query[::2].isnan().all()
    assert (made.window_key[0] == 1000).all()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (7, 1)])
def test_windows_are_attended_to_as_if_what_is_new_were_there(heads: int, kv_heads: int):
    # In the sink, at its end, in the ring, over its turn; what was there before counts in others.
    attention = WindowAttention(WINDOW, heads, kv_heads, 64)
    made = Published(attention, [1, 16, 17, 200, 0, 500], [5, 0, 3, 1, 2, 4], before=0.5)
    there = made.attend(made.query.float().to(DEVICE), None)
    settle()
    assert all(map(torch.equal, made.states, there))
    assert made.states.lse[0].isfinite().any()


@dataclass
class Answered:
    """States of a layer's two parts, and what the merge makes of them."""

    handover: Handover
    answered_step: int = STEP
    skip: int = 0
    is_host_empty: bool = False
    timeout_ns: int = 10**10
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        shape, rows = self.handover, 2
        generator = torch.Generator().manual_seed(shape.num_splits)
        states = (rows, shape.num_heads, shape.num_splits)
        self.window_output = torch.randn(*states, shape.head_dim, generator=generator)
        self.window_lse = 3 * torch.randn(states, generator=generator)
        if shape.num_splits > 1:
            self.window_lse[:, ::2, 1] = -math.inf
        self.host_output = pinned(rows, shape.num_heads, shape.head_dim, dtype=torch.float32)
        self.host_output.normal_(generator=generator)
        self.host_lse = pinned(rows, shape.num_heads, dtype=torch.float32)
        self.host_lse.normal_(generator=generator)
        # Where the host has nothing it need not clear what an earlier step left.
        self.host_lse[0, 0] = -math.inf
        self.host_output[0, 0] = math.nan
        if self.is_host_empty:
            self.host_lse.fill_(-math.inf)
            self.host_output.fill_(math.nan)
        self.error = pinned(1, dtype=torch.int32)
        self.stamps = on_device([-1, -1], torch.int64)
        output = torch.empty(rows, shape.num_heads, shape.head_dim, device=DEVICE, dtype=self.dtype)
        shape.await_and_merge(
            self.window_output.to(DEVICE),
            self.window_lse.to(DEVICE),
            self.host_output,
            self.host_lse,
            pinned(1, dtype=torch.int64, value=self.answered_step),
            pinned(1, dtype=torch.int32, value=self.skip),
            on_device([STEP]),
            self.error,
            self.stamps,
            on_device([-1]),
            output,
            timeout_ns=self.timeout_ns,
            error_code=21,
        )
        settle()
        self.output = output.cpu()

    def expected(self, host_lse: Tensor | None = None) -> Tensor:
        given = self.host_lse if host_lse is None else host_lse
        return reference.merge_parts(
            self.window_output.double(), self.window_lse.double(), self.host_output, given.double()
        )


@pytest.mark.parametrize("num_splits", [1, 3, 6])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(3, 3, 64), (9, 3, 64), (8, 2, 128), (7, 1, 64), (8, 1, 64)]
)
def test_window_and_host_merge_to_one_attention(
    heads: int, kv_heads: int, head_dim: int, num_splits: int
):
    made = Answered(Handover(heads, kv_heads, head_dim, num_splits))
    torch.testing.assert_close(made.output.double(), made.expected(), atol=1e-6, rtol=1e-6)
    assert made.error.item() == 0
    begin, end = made.stamps.tolist()
    assert 0 < begin <= end


def test_two_equal_parts_are_their_mean():
    # By hand: the same weight on the window's 0 and on the host's 2.
    output = torch.empty(1, 1, 16, device=DEVICE)
    Handover(1, 1, 16, num_splits=1).await_and_merge(
        torch.zeros(1, 1, 1, 16, device=DEVICE),
        torch.zeros(1, 1, 1, device=DEVICE),
        pinned(1, 1, 16, dtype=torch.float32, value=2.0),
        pinned(1, 1, dtype=torch.float32),
        pinned(1, dtype=torch.int64, value=1),
        pinned(1, dtype=torch.int32),
        on_device([1]),
        pinned(1, dtype=torch.int32),
        on_device([0, 0], torch.int64),
        on_device([-1]),
        output,
        timeout_ns=10**10,
        error_code=1,
    )
    assert torch.equal(output.cpu(), torch.ones(1, 1, 16))


def test_an_answer_of_a_later_step_is_an_answer():
    made = Answered(Handover(4, 2, 64, 2), answered_step=STEP + 1)
    torch.testing.assert_close(made.output.double(), made.expected(), atol=1e-6, rtol=1e-6)


def test_a_layer_that_is_skipped_neither_waits_nor_reads_the_host():
    made = Answered(Handover(4, 2, 64, 2), answered_step=0, skip=1)
    nothing = torch.full_like(made.host_lse, -math.inf)
    torch.testing.assert_close(made.output.double(), made.expected(nothing), atol=1e-6, rtol=1e-6)
    assert made.error.item() == 0


def test_a_host_that_has_nothing_leaves_the_window():
    made = Answered(Handover(4, 2, 64, 2), is_host_empty=True)
    torch.testing.assert_close(made.output.double(), made.expected(), atol=1e-6, rtol=1e-6)


def test_a_host_that_does_not_answer_is_given_up_and_named():
    made = Answered(Handover(4, 2, 64, 2), answered_step=STEP - 1, timeout_ns=1000)
    assert made.error.item() == 21
    nothing = torch.full_like(made.host_lse, -math.inf)
    torch.testing.assert_close(made.output.double(), made.expected(nothing), atol=1e-6, rtol=1e-6)
    begin, end = made.stamps.tolist()
    assert end - begin >= 1000


def test_the_output_is_of_the_models_dtype():
    made = Answered(Handover(4, 2, 64, 2), dtype=torch.bfloat16)
    torch.testing.assert_close(made.output.double(), made.expected(), atol=2e-2, rtol=1e-2)


def test_shapes_that_no_kernel_takes_are_refused():
    for heads, kv_heads, head_dim, num_splits in [(3, 2, 64, 1), (2, 2, 80, 1), (2, 2, 64, 0)]:
        with pytest.raises(ShapeError):
            Handover(heads, kv_heads, head_dim, num_splits)
