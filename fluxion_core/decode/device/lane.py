"""The GPU's end of the task queue: runners whose kernels are captured once, driven natively."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from fluxion_core.decode.device.graph import StepGraph, launch_address
from fluxion_core.decode.device.pinned import pinned
from fluxion_core.decode.device.times import LANE_TASKS, LaneSpan
from fluxion_core.geometry import KvGeometry
from fluxion_core.kernels import _native
from fluxion_core.kernels.lane_task import (
    DONE,
    LEVEL,
    LSE,
    OUTPUT,
    QUERY,
    SLAB_TABLE,
    STATISTICS,
)
from fluxion_core.kernels.sparse_attention.lane import DigestCopies, LaneKernels
from fluxion_core.planning.constants import READ_ALL

_GPU_BYTES_PER_NS = 40.0
_CPU_BYTES_PER_NS_OF_A_THREAD = 6.0
"""What the lane believes of this machine until it has measured."""


class GpuLane:
    """Takes tasks of a layer and does them on the device.

    Args:
        geometry: of the store, whose memory the device can address.
        num_heads: query heads of the model.
        max_region_tokens: of what is read of a sequence.
        device: that runs the tasks.
        num_threads: of the CPU pool on the other end of the queue.
        digests: copies of the store's digests on the device, to be scanned in their place.
        is_float32: whether the model is.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        num_heads: int,
        max_region_tokens: int,
        device: torch.device,
        *,
        num_threads: int,
        digests: DigestCopies | None = None,
        is_float32: bool = False,
    ) -> None:
        nowhere = pinned(16 * geometry.head_dim, dtype=torch.int64)
        self._kernels = [
            LaneKernels(
                geometry,
                num_heads,
                max_region_tokens,
                device=device,
                digests=digests,
                is_float32=is_float32,
            )
            for _ in range(LANE_TASKS)
        ]
        self._done = pinned(LANE_TASKS, dtype=torch.int64)
        self._statistics = pinned(LANE_TASKS, 4, dtype=torch.int64)
        for index, kernels in enumerate(self._kernels):
            # Where they answer to never changes. The warm-up reads all of an empty region.
            kernels.descriptor[DONE.value] = self._done[index].data_ptr()
            kernels.descriptor[STATISTICS.value] = self._statistics[index].data_ptr()
            kernels.descriptor[LEVEL.value] = READ_ALL
            for word in (SLAB_TABLE, QUERY, OUTPUT, LSE):
                kernels.descriptor[word.value] = nowhere.data_ptr()
        self._graphs = [
            StepGraph(kernels.launch, torch.cuda.Stream(device, priority=-1))
            for kernels in self._kernels
        ]
        runners = [
            (
                graph.handle,
                graph.stream.cuda_stream,
                kernels.descriptor.numpy(),
                self._done[index : index + 1].numpy(),
                self._statistics[index].numpy(),
            )
            for index, (graph, kernels) in enumerate(zip(self._graphs, self._kernels, strict=True))
        ]
        self.native = _native.GpuLane(
            launch_address(),
            runners,
            _GPU_BYTES_PER_NS,
            _CPU_BYTES_PER_NS_OF_A_THREAD * num_threads,
            digests is not None,
        )

    def spans(self) -> npt.NDArray[np.int64]:
        """[tasks, 6] What it did in the last step; columns as in LaneSpan."""
        return np.frombuffer(self.native.spans(), np.int64).reshape(-1, len(LaneSpan._fields))
