"""Whose turn it is: priority, age, fairness between clients, deadlines. Orders written by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.decode.waiting_line import AGING_SECONDS, Priority, WaitingLine, WaitingRequest


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def line(clock: Clock) -> WaitingLine:
    return WaitingLine(clock)


def wait(
    line: WaitingLine,
    client: str = "a",
    priority: Priority = Priority.NORMAL,
    deadline: float = math.inf,
    cost: int = 100,
) -> WaitingRequest:
    one = WaitingRequest(client, priority, deadline, cost)
    line.join(one)
    return one


def served(line: WaitingLine) -> list[WaitingRequest]:
    """All of the line, one after the other."""
    order = []
    while (first := line.first()) is not None:
        line.leave(first)
        line.give(first)
        order.append(first)
    return order


def test_a_clients_requests_go_by_deadline_and_then_by_age(line):
    late, none, soon, also_none = (
        wait(line, deadline=2000.0),
        wait(line),
        wait(line, deadline=1500.0),
        wait(line),
    )
    assert served(line) == [soon, late, none, also_none]


def test_clients_have_turns_by_what_they_were_given(line):
    many = [wait(line, "a") for _ in range(4)]
    large = wait(line, "b", cost=250)
    small = wait(line, "b", cost=100)
    # a: 100. b: 250. a: 200, 300. b: 350. a: 400.
    assert served(line) == [many[0], large, many[1], many[2], small, many[3]]


def test_who_has_been_away_saves_nothing_up(line):
    first = [wait(line, "a") for _ in range(5)]
    assert served(line) == first
    # b has never been given anything, and yet does not get five turns before a's next one.
    theirs = [wait(line, "b") for _ in range(3)]
    ours = [wait(line, "a") for _ in range(2)]
    order = served(line)
    assert order[0] is theirs[0]
    assert order.index(ours[0]) <= 2


def test_priority_comes_first_and_age_makes_up_for_it(line, clock):
    low = wait(line, priority=Priority.LOW)
    normal = wait(line)
    high = wait(line, priority=Priority.HIGH)
    assert line.first() is high
    assert [line.ahead_of(one) for one in (high, normal, low)] == [0, 1, 2]
    clock.now += 2 * AGING_SECONDS
    fresh = wait(line, priority=Priority.HIGH)
    # All three are older than the new one, and the old order among them holds.
    assert served(line) == [high, normal, low, fresh]


def test_ahead_of_one_who_has_not_joined(line):
    wait(line, "a")
    wait(line, "a", deadline=1200.0)
    assert line.ahead_of(WaitingRequest("a", Priority.NORMAL, math.inf, 1)) == 2
    assert line.ahead_of(WaitingRequest("a", Priority.NORMAL, 1100.0, 1)) == 0
    # One of a's, for its priority; then a has been given more.
    assert line.ahead_of(WaitingRequest("b", Priority.LOW, 1100.0, 1)) == 1


def test_those_of_others_that_come_before_ones_last_are_counted(line):
    for _ in range(3):
        wait(line, "a")
    for _ in range(5):
        wait(line, "b", cost=200)
    # By hand: a, b, a, b, a and then this one, who have been given 0, 0, 100, 200, 200 and 300.
    assert line.ahead_of(WaitingRequest("a", Priority.NORMAL, math.inf, 100)) == 5
    assert line.ahead_of(WaitingRequest("c", Priority.LOW, math.inf, 100)) == 2


@pytest.mark.parametrize("age", [0, 29, 31, 61, 1000])
def test_a_backlog_of_whatever_age_does_not_come_before_another_client(line, clock, age):
    for _ in range(20):
        line.give(WaitingRequest("a", Priority.NORMAL, math.inf, 1000))
    backlog = [wait(line, "a", Priority.HIGH, cost=1000) for _ in range(50)]
    clock.now += age
    single = wait(line, "b", Priority.LOW, cost=1000)
    assert line.first() is single
    assert line.ahead_of(single) == 0
    assert line.ahead_of(backlog[-1]) == 50


def test_ever_new_clients_do_not_keep_an_old_one_waiting(line):
    line.give(WaitingRequest("old", Priority.NORMAL, math.inf, 10_000))
    line.give(WaitingRequest("another", Priority.NORMAL, math.inf, 100))
    old = wait(line, "old")
    for number in range(1000):
        wait(line, f"new {number}", Priority.HIGH, cost=100)
        first = line.first()
        line.give(first)
        line.leave(first)
        if first is old:
            break
    assert first is old


def test_ever_new_urgent_requests_do_not_keep_a_clients_old_one_waiting(line, clock):
    old = wait(line, priority=Priority.LOW)
    first = None
    for _ in range(100):
        clock.now += 1
        wait(line, priority=Priority.HIGH, deadline=clock.now + 5)
        first = line.first()
        line.give(first)
        line.leave(first)
        if first is old:
            break
    assert first is old


def test_of_the_longest_line_the_last_is_told(line):
    assert line.last_of_longest() is None
    last = [wait(line, "a", Priority.LOW), *(wait(line, "a") for _ in range(2))][0]
    wait(line, "b")
    assert line.last_of_longest() is last
    assert [line.waiting_of(client) for client in "abc"] == [3, 1, 0]


def test_clients_that_nothing_speaks_against_are_forgotten(line):
    for number in range(5000):
        one = wait(line, f"client {number}")
        line.give(one)
        line.leave(one)
    assert len(line._shares) <= 1025


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"), st.sampled_from(Priority), st.integers(1, 50), st.booleans()
        ),
        max_size=60,
    )
)
def test_nobody_is_lost_and_busy_clients_share_alike(moves):
    clock = Clock()
    line = WaitingLine(clock)
    joined, left = [], []
    for client, priority, cost, serve in moves:
        clock.now += 1
        joined.append(wait(line, client, priority, cost=cost))
        if serve and (first := line.first()) is not None:
            line.leave(first)
            line.give(first)
            left.append(first)
    left += served(line)
    assert sorted(map(id, left)) == sorted(map(id, joined))
    # While all wait from the start with one priority, no client gets ahead by more than a request.
    line = WaitingLine(clock)
    for client, _, cost, _ in moves:
        wait(line, client, cost=cost)
    given_to = dict.fromkeys("abc", 0)
    while (first := line.first()) is not None:
        waiting = {one.client for one in line._waiting}
        assert given_to[first.client] <= min(given_to[client] for client in waiting)
        line.leave(first)
        line.give(first)
        given_to[first.client] += first.cost_tokens
