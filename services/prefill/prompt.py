"""A prompt on a prefill node: what is asked, where it goes, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from fluxion_core.generation.sampling import SamplingParams
from fluxion_core.geometry import WindowSpec
from fluxion_core.kvstream.handoff import Frame, Trailer
from fluxion_core.prompt.compute import PromptComputation


@dataclass(eq=False)
class Prompt:
    """One prompt in the engine. Its fields are the engine's from `submit` to `on_end`."""

    request_id: str
    token_ids: list[int]
    kv_from_token: int
    sampling: SamplingParams
    on_frame: Callable[[Frame], None]
    """Takes each CHUNK frame."""
    on_end: Callable[[Trailer | BaseException], None]
    """Called once, with the trailer or with what went wrong."""
    outgoing_bytes: Callable[[], int]
    """KV that was handed out and has not been taken. From any thread."""
    profile_window: WindowSpec | None = None
    """The receiver's default window, if it wants a profile of the prompt."""
    submitted: float = field(default_factory=time.perf_counter)
    is_cancelled: bool = False
    num_computed: int = 0
    computation: PromptComputation | None = None
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    profile_seconds: float = 0.0
    """Of prefill_seconds."""
    num_chunks: int = 0
    payload_bytes: int = 0
