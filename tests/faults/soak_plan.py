"""What the soak does and when, drawn from a seed: requests, how their clients leave, and faults."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from enum import Enum

from fluxion_proto.v1 import generate_pb2

MAX_PROMPT_TOKENS = 2400
MAX_NEW_TOKENS = 160
CONTEXT_TOKENS = 4096

POLICIES = ("exact", "exact", "exact", "fixed(16, 5 %)", "threshold(0.1)", "marginal(0.003)")


class Leaving(Enum):
    """How a client ends its request."""

    AT_THE_END = "waits for the end"
    CANCELS = "cancels"
    DISCONNECTS = "disconnects"
    DEADLINE = "has a deadline"


@dataclass(frozen=True)
class PlannedRequest:
    """One request."""

    number: int
    at: float
    """Seconds after the beginning."""
    is_follow_up: bool
    """Continues what another request has said, if one has finished."""
    new_prompt: tuple[int, ...]
    new_tokens: int
    policy: str
    priority: int
    leaving: Leaving
    after_tokens: int
    """Tokens that a client takes before it cancels or disconnects; 0: it does so after
    `after_seconds`."""
    after_seconds: float
    """Or its deadline."""


@dataclass(frozen=True)
class PlannedFault:
    """Something that is done to prefill nodes."""

    at: float
    """Seconds after the beginning, not before the last one is over."""
    kind: str
    """kill, kill both, or stop."""
    node: int
    seconds: float
    """Until it is started again, or goes on."""


def plan_requests(seed: int, seconds: float, rate: float) -> list[PlannedRequest]:
    """Open loop: arrivals of a Poisson process, `rate` a second."""
    draw = random.Random(f"requests {seed}")
    planned: list[PlannedRequest] = []
    at = draw.expovariate(rate)
    while at < seconds:
        length = int(math.exp(draw.uniform(math.log(16), math.log(MAX_PROMPT_TOKENS))))
        leaving = draw.choices(list(Leaving), weights=(70, 10, 8, 12))[0]
        planned.append(
            PlannedRequest(
                number=len(planned),
                at=at,
                is_follow_up=draw.random() < 0.3,
                new_prompt=tuple(draw.randrange(256) for _ in range(length)),
                new_tokens=int(math.exp(draw.uniform(0, math.log(MAX_NEW_TOKENS)))),
                policy=draw.choice(POLICIES),
                priority=draw.choice(generate_pb2.Priority.values()),
                leaving=leaving,
                after_tokens=draw.choice((0, 0, 1, 5, 20)),
                after_seconds=math.exp(draw.uniform(math.log(0.02), math.log(8))),
            )
        )
        at += draw.expovariate(rate)
    return planned


def plan_faults(seed: int, seconds: float) -> list[PlannedFault]:
    """One after another, 10 to 40 s between two; half of them kill."""
    draw = random.Random(f"faults {seed}")
    planned: list[PlannedFault] = []
    at = draw.uniform(5, 20)
    while at < seconds:
        kind = draw.choices(("kill", "kill both", "stop"), weights=(45, 10, 45))[0]
        pause = draw.uniform(0.5, 20 if kind == "stop" else 4)
        planned.append(PlannedFault(at, kind, draw.randrange(2), pause))
        at += pause + draw.uniform(10, 40)
    return planned
