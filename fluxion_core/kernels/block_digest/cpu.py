"""KV into slabs, with digests built on the way. Native; the GIL is released."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fluxion_core.geometry import KvGeometry
from fluxion_core.kernels import _native
from fluxion_core.kernels.isa import native_layout


def ingest_blocks(
    geometry: KvGeometry,
    slab_address: int,
    layer: int,
    first_token_in_slab: int,
    num_tokens: int,
    payload: npt.NDArray[np.uint8],
) -> bool:
    """Copy blocks of one layer into a slab and digest every complete one at all block sizes.

    A ragged last block is filled up with zeros and not digested. Blocks of a
    layer must come in order: a coarse digest begins with its first 16-token block.

    Args:
        geometry: layout of the slab.
        slab_address: start of the slab.
        layer: 0 to num_layers - 1.
        first_token_in_slab: a multiple of 16.
        num_tokens: tokens to take, at most to the slab's end.
        payload: [kv_heads, bytes], of each head `[block][K 16 x D | V 16 x D]` in bf16, at least
            the blocks to take; heads may lie apart.

    Returns:
        Whether K and V of all tokens taken are finite. They are in the slab in any case.

    Raises:
        ShapeError: the run does not lie on blocks inside the slab, or is not what payload holds.

    Cost: reads and writes the payload once, K twice; writes 11.7 % of it as digests.
    """
    return _native.ingest_blocks(
        native_layout(geometry), slab_address, layer, first_token_in_slab, num_tokens, payload
    )


def payload_of(kv: Tensor) -> npt.NDArray[np.uint8]:
    """Payload of `ingest_blocks`, of KV [kv_heads, blocks, 2, 16, head_dim] in bfloat16: a view."""
    return kv.view(torch.uint8).flatten(1).numpy()


def append_tokens(
    geometry: KvGeometry,
    slab_addresses: npt.NDArray[np.int64],
    tokens_in_slab: npt.NDArray[np.int64],
    layer: int,
    key: Tensor,
    value: Tensor,
    first_not_finite: npt.NDArray[np.int32],
) -> None:
    """Write one token's K and V of one layer for every sequence of a batch, in bfloat16.

    Rounded to nearest, ties to even, as torch does. A block that becomes complete is digested.

    Args:
        geometry: layout of the slabs.
        slab_addresses: [batch] int64; the slab that takes each sequence's token.
        tokens_in_slab: [batch] int64; position within that slab.
        layer: 0 to num_layers - 1.
        key: [batch, kv_heads, head_dim] float32 on the CPU; rows may lie apart.
        value: like key.
        first_not_finite: [batch] int32; lowered to `layer` where K or V is NaN or an infinity, as
            it is stored.

    Raises:
        ShapeError: shapes, dtypes or strides differ from the above.
        TypeError: a tensor is one that NumPy has no view of: bfloat16, or on another device.
    """
    _native.append_tokens(
        native_layout(geometry),
        slab_addresses,
        tokens_in_slab,
        layer,
        key.numpy(),
        value.numpy(),
        first_not_finite,
    )
