"""CUDA graphs as plain handles, which native code launches without Python or torch.

Captured with torch, instantiated and launched through the driver: a launch is then one call of
`cuGraphLaunch`, for which the native side is given the function's address.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch

from fluxion_core.errors import DeviceError, FluxionError


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def launch_address() -> int:
    """Address of `cuGraphLaunch(graph, stream)`."""
    address = ctypes.cast(_driver().cuGraphLaunch, ctypes.c_void_p).value
    assert address is not None
    return address


class StepGraph:
    """Launches of a function, captured once.

    Args:
        body: launches on the current stream; called some times before, so that everything is
            compiled and allocated.
        stream: to capture on, and to launch on.
        warm_ups: calls before the capture.
    """

    def __init__(
        self, body: Callable[[], object], stream: torch.cuda.Stream, *, warm_ups: int = 2
    ) -> None:
        self.stream = stream
        # The graph goes on using what the body made and holds.
        self._body = body
        # What the body reads may have been made on another stream.
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for _ in range(warm_ups):
                body()
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            body()
        handle = ctypes.c_void_p()
        code = _driver().cuGraphInstantiateWithFlags(
            ctypes.byref(handle),
            ctypes.c_void_p(self._graph.raw_cuda_graph()),
            ctypes.c_ulonglong(0),
        )
        if code or handle.value is None:
            raise FluxionError(f"a CUDA graph could not be instantiated: CUDA error {code}")
        self.handle: int = handle.value
        """Of the instantiated graph."""
        # Its first launch uploads it: now, while no kernel waits for what this graph is to do.
        self.launch()
        stream.synchronize()

    def launch(self) -> None:
        """Put it on its stream.

        Raises:
            DeviceError: CUDA refuses, for example because a kernel of this process has failed.
        """
        code = _driver().cuGraphLaunch(
            ctypes.c_void_p(self.handle), ctypes.c_void_p(self.stream.cuda_stream)
        )
        if code:
            raise DeviceError(f"a CUDA graph could not be launched: CUDA error {code}")
