"""Decode attention: the default window dense, the retrieval region from host memory, merged by lse.

The attention port that the decode engine puts behind the model. Once per layer, for all sequences
of a step: append k and v to window and store, attend over the window, attend over the region in
place, merge. The softmax over window and region together is exact, whatever computes each part.

What does not change: KV that is stored is never moved or rewritten; a step's results depend on each
sequence alone, not on its neighbours in the batch.

Policies. `exact` reads the whole retrieval region. Not here: how KV comes into the store, and the
model's weights.
"""

from __future__ import annotations

from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.kvstore.store import SequenceKv
from fluxion_core.kvstore.window import DeviceWindow


class HybridAttention:
    """Attention of one decode step over window and host store, policy `exact`.

    A step is `begin_step`, one `attend` per layer in order, `end_step`. One engine thread only.

    Args:
        geometry: layout of the store.
        window_spec: which tokens are in the window.
        window: the device-resident part.
    """

    def __init__(self, geometry: KvGeometry, window_spec: WindowSpec, window: DeviceWindow) -> None:
        self._geometry = geometry
        self._spec = window_spec
        self._window = window
        self._sequences: list[SequenceKv] = []
