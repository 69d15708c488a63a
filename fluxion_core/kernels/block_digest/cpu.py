"""KV into slabs, with digests built on the way. Native; the GIL is released."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry
from fluxion_core.kernels import _native
from fluxion_core.kernels.isa import native_layout


def ingest_blocks(
    geometry: KvGeometry,
    slab_address: int,
    layer: int,
    first_token_in_slab: int,
    num_tokens: int,
    payload_address: int,
    payload_head_bytes: int,
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
        payload_address: `[kv_head][block][K 16 x D | V 16 x D]` bf16, at the first block to take.
        payload_head_bytes: from one head of the payload to the next.

    Returns:
        Whether K and V of all tokens taken are finite. They are in the slab in any case.

    Raises:
        ShapeError: the run does not lie on blocks inside the slab.

    Cost: reads and writes the payload once, K twice; writes 11.7 % of it as digests.
    """
    if (
        first_token_in_slab % BLOCK_TOKENS
        or num_tokens <= 0
        or not 0 <= first_token_in_slab <= geometry.slab_tokens - num_tokens
        or not 0 <= layer < geometry.num_layers
    ):
        raise ShapeError(
            f"tokens {first_token_in_slab} to {first_token_in_slab + num_tokens} of layer {layer} "
            f"are no blocks of a slab of {geometry.slab_tokens} tokens"
        )
    return _native.ingest_blocks(
        native_layout(geometry),
        slab_address,
        layer,
        first_token_in_slab,
        num_tokens,
        payload_address,
        payload_head_bytes,
    )


def append_tokens(
    geometry: KvGeometry,
    slab_addresses: Tensor,
    tokens_in_slab: Tensor,
    layer: int,
    key: Tensor,
    value: Tensor,
    first_not_finite: Tensor,
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
    """
    shape = (slab_addresses.numel(), geometry.num_kv_heads, geometry.head_dim)
    for tensor in (key, value):
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise ShapeError(f"expected {shape} float32, got {tuple(tensor.shape)} {tensor.dtype}")
        if tensor.stride()[1:] != (geometry.head_dim, 1) or tensor.device.type != "cpu":
            raise ShapeError("each token's keys and values must be contiguous and on the CPU")
    if first_not_finite.shape != shape[:1] or first_not_finite.dtype != torch.int32:
        raise ShapeError(f"first_not_finite is {tuple(first_not_finite.shape)}; one int32 a row")
    if not 0 <= layer < geometry.num_layers:
        raise ShapeError(f"layer {layer} of {geometry.num_layers}")
    _native.append_tokens(
        native_layout(geometry),
        slab_addresses.data_ptr(),
        tokens_in_slab.data_ptr(),
        shape[0],
        layer,
        key.data_ptr(),
        key.stride(0),
        value.data_ptr(),
        value.stride(0),
        first_not_finite.data_ptr(),
    )
