"""The wait for the host's part of a layer with a tier: only if something misses."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fluxion_core.kernels.handover.triton import await_flag
from fluxion_core.kernels.system_memory import global_timer


@triton.jit
def await_as_last(
    takes_part,
    programs,
    needs,
    arrivals_ptr,
    answered_ptr,
    skip_ptr,
    step_ptr,
    error_ptr,
    stamps_ptr,
    has_answer_ptr,
    timeout_ns,
    error_code,
):
    """The last of the programs that take part waits: one alone, since it reads over the link.

    Where nothing is needed none comes last: the first one says so.
    """
    counts = takes_part & (needs != 0)
    arrived = tl.atomic_add(arrivals_ptr, 1, mask=counts, sem="relaxed")
    if tl.where(needs != 0, counts & (arrived == programs - 1), tl.program_id(0) == 0):
        tl.store(arrivals_ptr, 0)
        # fmt: off
        await_missing(answered_ptr, skip_ptr, needs, step_ptr, error_ptr, stamps_ptr,
                      has_answer_ptr, timeout_ns, error_code)
        # fmt: on


@triton.jit
def await_missing(
    answered_ptr,
    skip_ptr,
    needs,
    step_ptr,
    error_ptr,
    stamps_ptr,
    has_answer_ptr,
    timeout_ns,
    error_code,
):
    """Wait for the host if some group misses, tell whether it answered, stamp begin and end.

    No barrier may come after it: warps may see the host's flag at different times.
    """
    begin = global_timer()
    tl.store(stamps_ptr, begin)
    tl.store(stamps_ptr + 1, begin)
    tl.store(has_answer_ptr, 0)
    # What lies on the other side of the link is not read without need.
    if tl.load(skip_ptr, mask=needs != 0, other=1, volatile=True) == 0:
        # fmt: off
        await_flag(answered_ptr, tl.load(step_ptr), error_ptr, has_answer_ptr, begin, timeout_ns,
                   error_code)
        # fmt: on
        tl.store(stamps_ptr + 1, global_timer())


class HostWait(NamedTuple):
    """The wait for the host's part of a layer, if a group of it misses something.

    When `timeout_ns` has passed, `error` takes `error_code`, and there is no answer, so that the
    graph ends.
    """

    arrivals: Tensor
    """[1] int32 on the device, 0 between launches."""
    answered: Tensor
    """[1] int64 or int32, pinned: this layer's flag."""
    skip: Tensor
    """[1] int32, pinned: see Handover.await_and_merge."""
    needs: Tensor
    """[1] int32 on the device: groups of this layer that miss something; if 0, nothing is waited
    for, and nothing read over the link."""
    step: Tensor
    """[1] int32 on the device."""
    error: Tensor
    """[1] int32, pinned or on the device."""
    stamps: Tensor
    """[2] int64 on the device; the clock before and after the wait, equal if there was none."""
    has_answer: Tensor
    """[1] int32 on the device; takes whether the host's part is there."""
    timeout_ns: int
    """How long to wait at most."""
    error_code: int
    """Not 0; says which layer it was."""
