"""Which failures are tried again, after how long, and how often."""

from __future__ import annotations

import pytest

from fluxion_core.client.retry import NO_RETRIES, Attempts, RetryPolicy
from fluxion_core.errors import (
    AuthenticationError,
    CapacityError,
    DeadlineError,
    FluxionError,
    HandoffError,
    InvalidRequestError,
    PeerUnavailableError,
)
from fluxion_core.wire.status import RemoteUnavailableError

POLICY = RetryPolicy(attempts=4, first_delay_seconds=0.2, max_delay_seconds=30.0)


def full(seconds: float | None) -> CapacityError:
    return CapacityError(
        "memory", needed=2, free=1, unit="B", remedy="wait", retry_after_seconds=seconds
    )


def attempts(policy: RetryPolicy = POLICY, deadline: float | None = None, draw: float = 1.0):
    return Attempts(policy, deadline, clock=lambda: 100.0, draw=lambda: draw)


@pytest.mark.parametrize("error", [PeerUnavailableError("gone"), RemoteUnavailableError("drains")])
def test_an_absent_node_is_tried_again_after_delays_that_double(error: FluxionError):
    tries = attempts()
    assert [tries.delay_after(error) for _ in range(3)] == pytest.approx([0.2, 0.4, 0.8])
    with pytest.raises(type(error)):
        tries.delay_after(error)


def test_a_delay_is_drawn_from_its_upper_half():
    assert attempts(draw=0.0).delay_after(PeerUnavailableError("gone")) == pytest.approx(0.1)


def test_who_is_told_when_to_come_again_comes_no_sooner_and_not_at_once_with_others():
    assert attempts(draw=0.0).delay_after(full(5.0)) == 5.0
    assert attempts(draw=1.0).delay_after(full(5.0)) == pytest.approx(5.5)


@pytest.mark.parametrize("seconds", [None, 30.1])
def test_a_full_node_is_left_where_it_does_not_say_when_or_says_much_later(seconds):
    with pytest.raises(CapacityError) as refused:
        attempts().delay_after(full(seconds))
    assert refused.value.retry_after_seconds == seconds


@pytest.mark.parametrize(
    "kind", [InvalidRequestError, AuthenticationError, HandoffError, DeadlineError, FluxionError]
)
def test_what_would_fail_again_is_not_tried_again(kind: type[FluxionError]):
    with pytest.raises(kind):
        attempts().delay_after(kind("no"))


def test_no_wait_goes_past_the_deadline_and_every_attempt_has_what_is_left():
    now = [0.0]
    tries = Attempts(POLICY, 5.0, clock=lambda: now[0], draw=lambda: 0.0)
    assert tries.seconds_left() == 5.0
    assert tries.delay_after(full(4.0)) == 4.0
    now[0] = 4.5
    assert tries.seconds_left() == 0.5
    with pytest.raises(CapacityError):
        tries.delay_after(full(0.5))
    now[0] = 9.0
    assert 0 < tries.seconds_left() < 0.01


def test_one_attempt_is_one():
    with pytest.raises(PeerUnavailableError):
        attempts(NO_RETRIES).delay_after(PeerUnavailableError("gone"))
