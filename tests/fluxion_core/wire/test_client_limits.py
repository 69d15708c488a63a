"""What one client may ask for: the limit, how long to wait, and no memory of the idle."""

from __future__ import annotations

import pytest

from fluxion_core.config.settings import ClientLimitSettings
from fluxion_core.errors import CapacityError
from fluxion_core.wire.client_limits import ClientLimits


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_without_limits_nothing_is_refused_or_remembered():
    limits = ClientLimits(ClientLimitSettings())
    with limits.call("a"), limits.call("a"), limits.waiting("a", 1 << 40):
        assert limits.num_clients() == 1
    assert limits.num_clients() == 0


def test_calls_in_flight_are_counted_per_client():
    limits = ClientLimits(ClientLimitSettings(requests_in_flight=2))
    with limits.call("a"), limits.call("a"):
        with pytest.raises(
            CapacityError, match="client a in flight: need 1 calls, 0 calls free; 2"
        ):
            limits.call("a").__enter__()
        with limits.call("b"):
            pass
    with limits.call("a"):
        pass
    assert limits.num_clients() == 0


def test_a_call_that_fails_is_over_too():
    limits = ClientLimits(ClientLimitSettings(requests_in_flight=1))
    with pytest.raises(KeyError), limits.call("a"):
        raise KeyError
    with limits.call("a"):
        pass


def test_calls_a_minute_say_when_the_next_may_come():
    clock = Clock()
    limits = ClientLimits(ClientLimitSettings(requests_per_minute=2), clock=clock)
    for later in (0.0, 10.0):
        clock.now = 1000.0 + later
        with limits.call("a"):
            pass
    # By hand: the first of the two began at 1000 and counts until 1060; now is 1010.
    with pytest.raises(CapacityError, match=r"2 may begin in 60 s; retry in 50 s") as refusal:
        limits.call("a").__enter__()
    assert refusal.value.retry_after_seconds == 50.0
    clock.now = 1060.0
    with limits.call("a"):
        pass
    with pytest.raises(CapacityError):
        limits.call("a").__enter__()
    clock.now = 1200.0
    with limits.call("b"):
        pass
    assert limits.num_clients() <= 2


def test_waiting_tokens_are_given_back_with_the_first_token_or_the_end():
    limits = ClientLimits(ClientLimitSettings(waiting_tokens=100))
    # One that waits alone is never too long: nothing else would let it through later.
    with limits.waiting("a", 500):
        with pytest.raises(CapacityError, match="need 1 tokens, 0 tokens free; 500 of 100 wait"):
            limits.waiting("a", 1).__enter__()
    with limits.waiting("a", 60) as has_waited:
        with pytest.raises(CapacityError, match="need 50 tokens, 40 tokens free"):
            limits.waiting("a", 50).__enter__()
        has_waited()
        has_waited()
        with limits.waiting("a", 100):
            pass
    assert limits.num_clients() == 0


def test_many_clients_that_came_and_went_are_forgotten():
    clock = Clock()
    limits = ClientLimits(ClientLimitSettings(requests_per_minute=5), clock=clock)
    for number in range(5000):
        clock.now += 1.0
        with limits.call(f"10.0.0.{number}"):
            pass
    assert limits.num_clients() <= 1025
