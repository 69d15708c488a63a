"""The prefill engine: one thread that computes prompts, a chunk of one at a time.

Life of a prompt: `submit`; chunks, each through all layers, its KV handed out layer by layer; the
first token sampled from the last position's logits; `on_end`. Whose chunk is next is decided after
each (`line.py`). A prompt whose outgoing KV is not taken pauses: it gives its place up, and others
go on. What has been computed and not taken counts as KV of the engine until it is. `cancel` takes
effect before the next layer. A device that fails (DeviceError) ends everything: the engine takes
no prompt any more, and says so to `on_failure`, once.

`on_frame`, `on_end` and `on_failure` run on the engine's thread and must not block; a prompt
cancelled while it waits ends on the thread that cancels it. The engine knows frames, not gRPC.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch

from fluxion_core.errors import (
    CapacityError,
    DeviceError,
    DrainingError,
    FluxionError,
    RequestCancelledError,
)
from fluxion_core.generation.sampling import SamplingParams, sample
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry, WindowSpec
from fluxion_core.kvstream.handoff import Frame, Trailer
from fluxion_core.machine.threads import start
from fluxion_core.models.decoder import Decoder
from fluxion_core.observe.device_usage import DeviceUsage, UsageClock
from fluxion_core.observe.log import event
from fluxion_core.planning import prompt_profile
from fluxion_core.prompt.capture import KvCapture, max_piece_bytes
from fluxion_core.prompt.compute import PromptComputation
from fluxion_core.prompt.outbox import DeviceOutbox
from services.prefill.line import LineLimits, PrefillLoad, PromptLine, PromptWait
from services.prefill.own_time import OwnTime
from services.prefill.prompt import Prompt

_log = logging.getLogger(__name__)


@dataclass
class PrefillStatistics:
    """Counters since start. Seconds are of the engine's thread."""

    tokens: int = 0
    busy_seconds: float = 0.0
    payload_bytes: int = 0
    device: DeviceUsage | None = None
    """Of the GPU; None where there is none."""


class PrefillEngine:
    """Computes prompts on a thread of its own.

    Args:
        decoder: the model.
        geometry: of its KV.
        chunk_tokens: tokens at a time, or fewer: two chunks' KV is within `outgoing_bytes`.
        max_running: prompts that may have begun, those that pause not counted.
        max_waiting: prompts that may wait beside them.
        running_kv_bytes: KV of the prompts that have begun, and of those that are computed what was
            not taken yet; one prompt counts as seven eighths of it at most.
        outgoing_bytes: KV of one prompt that may wait to be taken.
        on_failure: told when the device has failed for good.
    """

    def __init__(
        self,
        decoder: Decoder,
        geometry: KvGeometry,
        *,
        chunk_tokens: int,
        max_running: int,
        max_waiting: int,
        running_kv_bytes: int,
        outgoing_bytes: int,
        on_failure: Callable[[DeviceError], None] = lambda _: None,
    ) -> None:
        self._decoder = decoder
        self._geometry = geometry
        self._chunk_tokens = _chunk_tokens_within(chunk_tokens, outgoing_bytes // 2, geometry)
        limits = LineLimits(
            chunk_tokens=self._chunk_tokens,
            max_running=max_running,
            max_waiting=max_waiting,
            running_kv_bytes=running_kv_bytes,
            outgoing_bytes=outgoing_bytes,
        )
        self._own_time = OwnTime(decoder.config)
        self._changed = threading.Condition()
        self._line = PromptLine(self._own_time.seconds, geometry.token_bytes, limits)
        """Whoever uses it holds `_changed`."""
        self._device = decoder.embedding.device
        self._stopping = False
        self._on_failure = on_failure
        self._failure: DeviceError | None = None
        self._outbox: DeviceOutbox | None = None
        if self._device.type == "cuda":
            self._outbox = DeviceOutbox(self._device, max_piece_bytes(geometry))
        self._statistics = self._new_statistics()
        self._clock = UsageClock(self._statistics.device)
        self._thread = threading.Thread(target=self._run, name="prefill-engine", daemon=True)

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a prompt computed at a time."""
        return self._chunk_tokens

    def warm_up(self) -> None:
        """Compute a few tokens, so that no prompt pays for first-time work. Before `start`."""
        self._compute_chunk(
            Prompt(
                request_id="warm-up",
                token_ids=[0] * BLOCK_TOKENS,
                kv_from_token=0,
                sampling=SamplingParams(),
                on_frame=lambda _: None,
                on_end=lambda _: None,
                outgoing_bytes=lambda: 0,
                profile_window=WindowSpec(),
            )
        )
        self._statistics = self._new_statistics()
        self._clock = UsageClock(self._statistics.device)

    def start(self) -> None:
        """Start the thread."""
        start(self._thread)

    def stop(self) -> None:
        """End the thread; prompts not finished end with an error. Idempotent."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, prompt: Prompt) -> None:
        """Queue a prompt.

        Raises:
            CapacityError: too many wait already.
            DrainingError: the engine is stopping.
            DeviceError: the device has failed.
        """
        with self._changed:
            if self._failure is not None:
                raise self._failure
            if self._stopping:
                raise DrainingError("this prefill node is shutting down; use another one")
            self._line.add(prompt)
            self._changed.notify()

    def cancel(self, prompt: Prompt) -> None:
        """Give a prompt up: at once if it waits, else before its next layer; then `on_end`."""
        with self._changed:
            was_waiting = self._line.cancel(prompt)
            self._changed.notify()
        if was_waiting:
            prompt.on_end(RequestCancelledError("the receiver ended the hand-off"))

    def wake(self) -> None:
        """Look again: KV of a prompt has been taken."""
        with self._changed:
            self._changed.notify()

    def load(self) -> PrefillLoad:
        """Prompts and tokens that are to be computed now."""
        with self._changed:
            return self._line.load()

    def wait(self, num_tokens: int) -> PromptWait:
        """The wait of a prompt of so many tokens, if it came now."""
        with self._changed:
            return self._line.wait(num_tokens, time.perf_counter())

    def statistics(self) -> PrefillStatistics:
        """A copy of the counters."""
        return deepcopy(self._statistics)

    def _new_statistics(self) -> PrefillStatistics:
        if self._device.type != "cuda":
            return PrefillStatistics()
        usage = DeviceUsage()
        usage.pcie_bytes["host_to_device", "weights"] = sum(
            weight.nbytes for weight in self._decoder.parameters()
        )
        return PrefillStatistics(device=usage)

    def _run(self) -> None:
        self._clock.start()
        while (prompt := self._next_prompt()) is not None:
            self._clock.account("no_work")
            outcome = self._take_turn(prompt)
            if isinstance(outcome, BaseException):
                self._forget_outgoing()
            self._clock.account("host_step")
            if outcome is not None:
                with self._changed:
                    self._line.end(prompt, is_computed=isinstance(outcome, Trailer))
                prompt.computation = None
                _end(prompt, outcome)
        with self._changed:
            left = self._line.clear()
        for prompt in left:
            prompt.computation = None
            _end(
                prompt,
                self._failure
                or DrainingError("this prefill node is shutting down; use another one"),
            )

    def _take_turn(self, prompt: Prompt) -> Trailer | BaseException | None:
        """Compute a prompt's next chunk; how the prompt ends, if it does."""
        first_token, seconds_before = prompt.num_computed, prompt.prefill_seconds
        try:
            outcome = self._compute_chunk(prompt)
        except FluxionError as error:
            return error
        except torch.OutOfMemoryError as error:
            return self._out_of_memory(prompt, error)
        except torch.AcceleratorError as error:
            return self._fail(error)
        except Exception as error:
            _log.exception(event("prefill failed", request_id=prompt.request_id))
            return error
        self._own_time.learn(
            first_token,
            prompt.num_computed - first_token,
            prompt.prefill_seconds - seconds_before,
        )
        return outcome

    def _out_of_memory(self, prompt: Prompt, error: torch.OutOfMemoryError) -> CapacityError:
        _log.error(event("out of device memory", request_id=prompt.request_id, error=str(error)))
        prompt.computation = None
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._device)
        return CapacityError(
            "device memory of the prefill node",
            needed=len(prompt.token_ids) * self._geometry.token_bytes,
            free=free,
            unit="B",
            remedy="lower engine.chunk_tokens or engine.running_kv_bytes there, or retry later",
        )

    def _fail(self, error: RuntimeError) -> DeviceError:
        _log.exception(event("the device has failed"))
        failure = DeviceError(f"the prefill node's {self._device} has failed: {error}")
        with self._changed:
            self._failure = failure
        self._on_failure(failure)
        return failure

    def _forget_outgoing(self) -> None:
        if self._outbox is not None and self._failure is None:
            self._outbox.drop()

    def _next_prompt(self) -> Prompt | None:
        """The one whose chunk is next, once there is one that can go on; None: stop."""
        with self._changed:
            while not (self._stopping or self._failure):
                if (prompt := self._line.next()) is not None:
                    return prompt
                self._changed.wait()
            return None

    def _compute_chunk(self, prompt: Prompt) -> Trailer | None:
        """One chunk through all layers; the trailer, if it was the last."""
        if prompt.is_cancelled:
            raise RequestCancelledError("the receiver ended the hand-off")
        started = time.perf_counter()
        if prompt.computation is None:
            prompt.queue_seconds = started - prompt.submitted
            capture = self._new_capture(prompt)
            prompt.computation = PromptComputation(self._decoder, prompt.token_ids, capture)
        computation = prompt.computation
        computed = computation.advance(self._chunk_tokens)
        num_tokens = computation.num_computed - prompt.num_computed
        prompt.num_computed = computation.num_computed
        first_token_id, packed = -1, b""
        if computed is not None:
            first_token_id = sample(
                computed.logits, prompt.sampling, prompt.token_ids, [], position=0
            )
            packed = prompt_profile.pack(computed.profiles) if computed.profiles else b""
        prompt.profile_seconds = computation.profile_seconds
        seconds = time.perf_counter() - started
        prompt.prefill_seconds += seconds
        self._statistics.busy_seconds += seconds
        self._statistics.tokens += num_tokens
        if (usage := self._statistics.device) is not None:
            usage.busy_seconds += computation.device_seconds
        if computed is None:
            return None
        return Trailer(
            first_token_id=first_token_id,
            queue_seconds=prompt.queue_seconds,
            prefill_seconds=prompt.prefill_seconds,
            num_chunks=prompt.num_chunks,
            payload_bytes=prompt.payload_bytes,
            prompt_profile=packed,
        )

    def _new_capture(self, prompt: Prompt) -> KvCapture:
        def emit(frame: Frame) -> None:
            prompt.num_chunks += 1
            prompt.payload_bytes += len(frame.payload)
            self._statistics.payload_bytes += len(frame.payload)
            if (usage := self._statistics.device) is not None:
                usage.pcie_bytes["device_to_host", "prefill_kv"] += len(frame.payload)
            prompt.on_frame(frame)

        return KvCapture(
            self._geometry,
            num_tokens=len(prompt.token_ids),
            kv_from_token=prompt.kv_from_token,
            emit=emit,
            is_cancelled=lambda: prompt.is_cancelled,
            device=self._device,
            outbox=self._outbox,
            profile_window=prompt.profile_window,
        )


def _end(prompt: Prompt, outcome: Trailer | BaseException) -> None:
    """Tell a prompt's end; whoever cannot take it does not keep the engine from the others."""
    try:
        prompt.on_end(outcome)
    except Exception:
        _log.exception(event("end of a prompt not taken", request_id=prompt.request_id))


def _chunk_tokens_within(chunk_tokens: int, limit_bytes: int, geometry: KvGeometry) -> int:
    """As many of them as have KV within the limit: whole blocks, at least one."""
    blocks = max(1, limit_bytes // (geometry.token_bytes * BLOCK_TOKENS))
    return min(chunk_tokens, blocks * BLOCK_TOKENS)
