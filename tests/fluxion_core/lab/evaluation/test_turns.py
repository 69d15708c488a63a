"""Two threads at one device take turns, and neither waits for more than one turn of the other."""

from __future__ import annotations

import threading

from fluxion_core.lab.evaluation.turns import Turns


def test_who_waits_is_next() -> None:
    turns, order = Turns(), []
    is_held, may_end = threading.Event(), threading.Event()

    def first() -> None:
        for number in range(3):
            with turns.take():
                order.append(f"first {number}")
                is_held.set()
                may_end.wait()

    def second() -> None:
        with turns.take():
            order.append("second")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    is_held.wait()
    threads[1].start()
    while not turns._door.locked():
        pass
    may_end.set()
    for thread in threads:
        thread.join()
    assert order == ["first 0", "second", "first 1", "first 2"]
