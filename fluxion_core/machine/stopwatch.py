"""Time that a device took for what was launched in between; on a CPU, time that passed."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Time of what is done on a device from now to `stop`."""

    def __init__(self, device: torch.device) -> None:
        self._events = (
            [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            if device.type == "cuda"
            else None
        )
        self._seconds = -time.perf_counter()
        if self._events is not None:
            self._events[0].record()

    def stop(self) -> None:
        """Mark the end: all is done, or launched."""
        if self._events is not None:
            self._events[1].record()
        self._seconds += time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time from its making to `stop`; waits for a GPU that is still at it."""
        if self._events is not None:
            self._events[1].synchronize()
            return float(self._events[0].elapsed_time(self._events[1])) / 1e3
        return self._seconds
