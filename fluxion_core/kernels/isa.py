"""The instruction set of the native kernels: the best of this CPU, unless told otherwise."""

from __future__ import annotations

from functools import cache

from fluxion_core.geometry import KvGeometry
from fluxion_core.kernels import _native


def current_isa() -> str:
    """Name of the instruction set in use: scalar, avx2, avx512 or avx512_vnni."""
    return _native.isa()


def available_isas() -> list[str]:
    """Instruction sets that this CPU runs, best last."""
    return _native.available_isas()


def set_isa(name: str) -> None:
    """Use this instruction set from now on, in the whole process.

    Raises:
        ValueError: this CPU does not run it, or there is none of this name.
    """
    _native.set_isa(name)


@cache
def native_layout(geometry: KvGeometry) -> _native.SlabLayout:
    """The native side's copy of a geometry."""
    return _native.SlabLayout(
        geometry.num_layers,
        geometry.num_kv_heads,
        geometry.head_dim,
        geometry.slab_tokens,
        geometry.digest_bits,
    )
