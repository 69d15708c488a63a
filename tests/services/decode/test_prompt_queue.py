"""Prompts wait fairly, within bounds, and leave when nobody waits for them any more."""

from __future__ import annotations

import asyncio
import threading

import pytest

from fluxion_core.errors import CapacityError
from services.decode.prompt_queue import FairTurns, PromptQueue, finish

TURNS_OF_THE_LOOP = 20
"""For all that is ready to happen."""


@pytest.fixture
def queue() -> PromptQueue:
    return PromptQueue(max_bytes=100)


class Work:
    """Steps that note their name, each of which may have to wait."""

    def __init__(self, name: str, num_steps: int, notes: list[str]) -> None:
        self.name, self.num_steps, self.notes = name, num_steps, notes
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.has_begun = threading.Event()

    def steps(self):
        for _ in range(self.num_steps):
            self.has_begun.set()
            assert self.may_go_on.wait(60)
            self.notes.append(self.name)
            yield
        return self.name


def test_steps_can_be_taken_at_once():
    notes: list[str] = []
    assert finish(Work("a", 3, notes).steps()) == "a"
    assert notes == ["a"] * 3


async def test_clients_take_turns_and_so_do_the_prompts_of_one(queue):
    notes: list[str] = []
    asked = [("a", "a1", 3), ("a", "a2", 3), ("b", "b1", 2), ("a", "a3", 1), ("c", "c1", 1)]
    works = [(client, Work(name, steps, notes)) for client, name, steps in asked]
    works[0][1].may_go_on.clear()
    running = [asyncio.ensure_future(queue.run(c, 10, w.steps())) for c, w in works]
    assert await asyncio.to_thread(works[0][1].has_begun.wait, 60)
    works[0][1].may_go_on.set()
    assert await asyncio.gather(*running) == [name for _, name, _ in asked]
    # By hand: after a1's step the line is a2, a3, a1 of a; b1 of b; c1 of c. The last step of each
    # ends it and notes nothing.
    assert notes == ["a1", "a2", "b1", "c1", "a3", "b1", "a1", "a2", "a1", "a2"]
    assert queue.waiting_bytes == 0


async def test_who_is_cancelled_while_waiting_is_gone_at_once(queue):
    notes: list[str] = []
    first, second, third = (Work(name, 1, notes) for name in ("first", "second", "third"))
    first.may_go_on.clear()
    running = [asyncio.ensure_future(queue.run("a", 10, w.steps())) for w in (first, second, third)]
    assert await asyncio.to_thread(first.has_begun.wait, 60)
    running[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await running[1]
    assert queue.waiting_bytes == 20
    first.may_go_on.set()
    assert await running[2] == "third"
    assert notes == ["first", "third"]


async def test_a_turn_is_not_lost_with_who_is_cancelled_as_it_is_given():
    turns = FairTurns()
    taken = turns.turn("a")
    await taken.__aenter__()

    async def take(client: str) -> str:
        async with turns.turn(client):
            return client

    waiting = [asyncio.ensure_future(take(client)) for client in ("a", "b", "b")]
    await asyncio.sleep(0)
    # Cancelled, and not run since; then one that has been called already.
    waiting[0].cancel()
    await taken.__aexit__(None, None, None)
    waiting[1].cancel()
    assert await asyncio.wait_for(waiting[2], 60) == "b"
    assert await asyncio.wait_for(take("c"), 60) == "c"
    assert [one.cancelled() for one in waiting] == [True, True, False]


async def test_who_is_cancelled_in_a_step_is_charged_until_it_is_over_and_has_no_other(queue):
    notes: list[str] = []
    work = Work("a", 5, notes)
    work.may_go_on.clear()
    running = asyncio.ensure_future(queue.run("a", 10, work.steps()))
    assert await asyncio.to_thread(work.has_begun.wait, 60)
    for _ in range(TURNS_OF_THE_LOOP):
        # However often.
        running.cancel()
        await asyncio.sleep(0)
    assert not running.done()
    assert queue.waiting_bytes == 10
    work.may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert (notes, queue.waiting_bytes) == (["a"], 0)
    # The turn went back too.
    assert await queue.run("b", 10, Work("b", 1, notes).steps()) == "b"


async def test_a_full_queue_refuses_with_a_time_and_leaves_half_to_others(queue):
    notes: list[str] = []
    first = Work("first", 1, notes)
    first.may_go_on.clear()
    running = [asyncio.ensure_future(queue.run("a", 50, first.steps()))]
    assert await asyncio.to_thread(first.has_begun.wait, 60)
    with pytest.raises(CapacityError, match="50 B of them are of a") as refused:
        await queue.run("a", 1, Work("second", 1, notes).steps())
    assert refused.value.retry_after_seconds is not None
    with pytest.raises(CapacityError):
        await queue.run("b", 51, Work("large", 1, notes).steps())
    running.append(asyncio.ensure_future(queue.run("b", 50, Work("b", 1, notes).steps())))
    await asyncio.sleep(0)
    assert queue.waiting_bytes == 100
    first.may_go_on.set()
    assert await asyncio.gather(*running) == ["first", "b"]


async def test_a_prompt_alone_is_always_taken_and_its_failure_is_its_own(queue):
    notes: list[str] = []
    assert await queue.run("a", 1000, Work("a", 2, notes).steps()) == "a"

    def fails():
        yield
        raise ValueError("no such token")

    with pytest.raises(ValueError, match="no such token"):
        await queue.run("a", 10, fails())
    assert queue.waiting_bytes == 0
    assert await queue.run("a", 10, Work("a", 1, notes).steps()) == "a"
