"""Faults that the native data plane finds, as errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluxion_core.errors import (
    FluxionError,
    FrameChecksumError,
    FrameFormatError,
    FrameOrderError,
    NonFiniteKvError,
    PeerUnavailableError,
    StreamTruncatedError,
)

if TYPE_CHECKING:
    from fluxion_core.kernels._native import PlaneFault

_BY_TEXT: dict[str, type[FluxionError]] = {
    "format": FrameFormatError,
    "truncated": StreamTruncatedError,
    "peer": PeerUnavailableError,
    "system": FluxionError,
}


def plane_error(fault: PlaneFault) -> FluxionError:
    """The error of a landing's or departure's fault.

    Args:
        fault: `(kind, text, layer, first_token, expected, found)`, as `state()` returns it.
    """
    kind, text, layer, first_token, expected, found = fault
    match kind:
        case "checksum":
            return FrameChecksumError(
                layer=layer, first_token=first_token, expected=expected, found=found
            )
        case "order":
            return FrameOrderError(layer=layer, expected_token=expected, found_token=found)
        case "non_finite":
            return NonFiniteKvError(layer=layer, token=first_token)
    return _BY_TEXT[kind](text)
