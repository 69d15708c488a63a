"""A step that is stuck is named, and its process ends; a step that is only long is left alone."""

from __future__ import annotations

import subprocess
import sys
import threading
from types import SimpleNamespace

from fluxion_core.generation.sampling import SamplingParams
from fluxion_core.planning.policy import ExactPolicy
from services.decode.engine import DecodeEngine, DecodeSequence
from services.decode.watchdog import StepWatchdog

STUCK_NODE = """
import logging, threading
from tests.services.decode.test_watchdog import StuckStep, sequence
from services.decode.engine import DecodeEngine
from services.decode.watchdog import StepWatchdog
logging.basicConfig()
engine = DecodeEngine(StuckStep())
engine.start()
engine.submit(sequence("request-7"))
StepWatchdog(engine, 0.2)
threading.Event().wait()
"""


class StuckStep:
    """Steps that do not end before they are told to."""

    usage = pool = None
    fills_ahead = False

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.began = threading.Event()

    def join(self, sequence):
        del sequence
        return 0

    def leave(self, slot):
        pass

    def check(self, row):
        pass

    def run(self, rows):
        del rows
        self.began.set()
        self.may_end.wait()
        raise ValueError("ended")


def sequence(request_id: str, on_end=lambda _: None) -> DecodeSequence:
    return DecodeSequence(
        request_id=request_id,
        kv=SimpleNamespace(num_tokens=9, damage=None),  # type: ignore[arg-type]
        policy=ExactPolicy(),
        planner_state=None,
        prompt_token_ids=[0],
        generated_token_ids=[1],
        sampling=SamplingParams(),
        on_token=lambda _: True,
        on_end=on_end,
    )


def test_a_stuck_step_is_named_and_ends_the_process() -> None:
    node = subprocess.run(
        [sys.executable, "-c", STUCK_NODE], capture_output=True, text=True, timeout=120, check=False
    )
    assert node.returncode == 1
    assert "decode step is stuck step=1" in node.stderr
    assert "requests=request-7" in node.stderr
    # And where it is.
    assert "in run" in node.stderr


def test_a_step_within_its_time_and_a_rest_are_left_alone() -> None:
    step, ended, has_ended = StuckStep(), [], threading.Event()
    engine = DecodeEngine(step)
    assert engine.current_step() is None
    engine.start()
    watchdog = StepWatchdog(engine, 60.0, end=lambda: ended.append(1))
    try:
        engine.submit(sequence("slow", lambda _: has_ended.set()))
        assert step.began.wait(60)
        current = engine.current_step()
        assert current is not None
        assert (current.number, current.request_ids) == (1, ("slow",))
        step.may_end.set()
        assert has_ended.wait(60)
    finally:
        watchdog.close()
        engine.stop()
    assert engine.current_step() is None
    assert ended == []
