"""Who gets memory, who waits and who is refused, over a real store of eight slabs."""

from __future__ import annotations

import asyncio

import pytest

from fluxion_core.errors import CapacityError, DrainingError
from fluxion_core.geometry import KvGeometry
from fluxion_core.kvstore.store import HostKvStore
from services.decode.admission import Admission
from services.decode.waiting_line import Priority

GEOMETRY = KvGeometry(num_layers=1, num_kv_heads=1, head_dim=16, slab_tokens=128)
SLABS = 8


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store() -> HostKvStore:
    probe = HostKvStore(GEOMETRY, 1 << 20, model_key=b"")
    return HostKvStore(GEOMETRY, SLABS * probe.slab_stride_bytes, model_key=b"")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def admission(store: HostKvStore, clock: Clock) -> Admission:
    return Admission(store, max_running=2, max_waiting=3, clock=clock)


class Requests:
    """Requests that hold what they get until they are told to end."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.order: list[str] = []
        self._endings: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, name: str, tokens: int = 100, **how) -> None:
        """Ask, and go on as far as that goes."""
        self._endings[name] = asyncio.Event()

        async def run() -> None:
            async with self._admission.admit([1] * tokens, 1, **how):
                self.order.append(name)
                await self._endings[name].wait()

        self._tasks[name] = asyncio.create_task(run())
        await asyncio.sleep(0)

    async def end(self, name: str) -> None:
        self._endings[name].set()
        await self._tasks[name]
        for _ in range(5):
            await asyncio.sleep(0)

    async def outcome(self, name: str) -> None:
        await self._tasks[name]


@pytest.fixture
async def requests(admission: Admission):
    made = Requests(admission)
    yield made
    for task in made._tasks.values():
        task.cancel()
    await asyncio.gather(*made._tasks.values(), return_exceptions=True)


async def test_turns_go_by_client_priority_and_deadline(admission, requests):
    await requests.ask("a1", client="a")
    await requests.ask("a2", client="a")
    await requests.ask("a3", client="a", deadline_seconds=900.0)
    await requests.ask("b1", client="b")
    await requests.ask("a-high", client="a", priority=Priority.HIGH)
    assert requests.order == ["a1", "a2"]
    assert (admission.statistics().admitted, admission.statistics().waiting) == (2, 3)
    for name in ("a1", "a2", "b1", "a-high"):
        await requests.end(name)
    assert requests.order == ["a1", "a2", "b1", "a-high", "a3"]


async def test_a_large_request_is_not_overtaken_for_ever(store, requests):
    await requests.ask("small", tokens=100)
    await requests.ask("large", tokens=128 * SLABS - 1)
    await requests.ask("later", tokens=100)
    # There is a place and memory for the last one, but it is not its turn.
    assert requests.order == ["small"]
    await requests.end("small")
    assert requests.order == ["small", "large"]
    await requests.end("large")
    assert requests.order == ["small", "large", "later"]
    await requests.end("later")
    assert store.statistics().reserved_bytes == 0


async def test_a_full_queue_says_when_to_come_again(admission, requests, clock):
    await requests.ask("first")
    await requests.ask("second")
    clock.now = 8.0
    await requests.end("first")
    for number in range(4):
        await requests.ask(f"more {number}")
    with pytest.raises(CapacityError, match="request queue: need 1 places") as refusal:
        async with admission.admit([1], 1):
            pass
    # A request holds its place for 8 s, and two run.
    assert refusal.value.retry_after_seconds == pytest.approx(4.0)


async def test_a_full_queue_of_one_client_has_a_place_for_another(admission, requests):
    for number in range(5):
        await requests.ask(f"a{number}", client="a")
    assert admission.statistics().waiting == 3
    await requests.ask("b0", client="b")
    for _ in range(5):
        await asyncio.sleep(0)
    assert requests._tasks["a4"].done()
    with pytest.raises(CapacityError, match="request queue: need 1 places"):
        await requests.outcome("a4")
    # Now a has two in the line and b one: another of b's would only turn that round.
    await requests.ask("b1", client="b")
    assert requests._tasks["b1"].done()
    with pytest.raises(CapacityError, match="3 requests wait already"):
        await requests.outcome("b1")
    for name in ("a0", "b0", "a1", "a2"):
        await requests.end(name)
    assert requests.order == ["a0", "a1", "b0", "a2", "a3"]


async def test_who_would_wait_beyond_its_deadline_is_refused_at_once(admission, requests, clock):
    await requests.ask("first")
    await requests.ask("second")
    clock.now = 20.0
    await requests.end("first")
    await requests.ask("third")
    await requests.ask("waits", deadline_seconds=11.0)
    # One is ahead: two places at 10 s each.
    with pytest.raises(CapacityError, match="need 20 s, 12 s free; its deadline") as refusal:
        async with admission.admit([1], 1, deadline_seconds=12.5):
            pass
    assert refusal.value.retry_after_seconds == pytest.approx(7.5)
    await requests.ask("patient", deadline_seconds=25.0)
    assert admission.statistics().waiting == 2


async def test_what_never_fits_is_refused_with_both_sizes(admission):
    with pytest.raises(CapacityError, match="host KV"):
        async with admission.admit([1] * (128 * SLABS), 1):
            pass


async def test_a_cancelled_wait_leaves_the_line_and_the_next_one_moves_up(admission, requests):
    await requests.ask("first")
    await requests.ask("second")
    await requests.ask("gone")
    await requests.ask("next")
    requests._tasks["gone"].cancel()
    await asyncio.sleep(0)
    await requests.end("first")
    assert requests.order == ["first", "second", "next"]
    assert admission.statistics().waiting == 0


async def test_a_prompt_is_named_once_however_often_it_looks_and_not_to_be_refused(
    store, requests, admission, monkeypatch: pytest.MonkeyPatch
):
    name, named = store.prefixes.name, []

    def counted(token_ids, domain):
        named.append(len(token_ids))
        return name(token_ids, domain)

    monkeypatch.setattr(store.prefixes, "name", counted)
    for number in range(2):
        await requests.ask(f"small {number}", tokens=10 + number)
    for number in range(3):
        await requests.ask(f"large {number}", tokens=128 * SLABS - 1 - number)
    with pytest.raises(CapacityError, match="request queue"):
        async with admission.admit([1] * 99, 1):
            pass
    for number in range(2):
        await requests.end(f"small {number}")
    assert requests.order[-1] == "large 0"
    # The first of the large ones has looked twice, the next one once since it is the first.
    assert named == [10, 11, 128 * SLABS - 1, 128 * SLABS - 2]


async def test_who_leaves_the_front_of_the_line_lets_the_next_one_look_at_once(admission, requests):
    await requests.ask("small", tokens=100)
    await requests.ask("large", tokens=128 * SLABS - 1)
    await requests.ask("next", tokens=100)
    assert requests.order == ["small"]
    # Nobody ends: there was room for the next one all the time, behind one for whom there is none.
    requests._tasks["large"].cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    assert requests.order == ["small", "next"]
    assert admission.statistics().waiting == 0


async def test_draining_refuses_those_who_wait_and_keeps_those_who_run(admission, requests):
    await requests.ask("first")
    await requests.ask("second")
    await requests.ask("waits")
    admission.drain()
    with pytest.raises(DrainingError):
        await requests.outcome("waits")
    with pytest.raises(DrainingError):
        async with admission.admit([1], 1):
            pass
    assert admission.statistics().admitted == 2
