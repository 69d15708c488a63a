"""The one table between Fluxion's errors and gRPC statuses, in both directions.

Anything that is not a FluxionError is a bug: the client learns a request id and nothing else, the
log learns the rest.
"""

from __future__ import annotations

import grpc

from fluxion_core.errors import (
    AuthenticationError,
    CapacityError,
    DeadlineError,
    DeviceError,
    DrainingError,
    FluxionError,
    HandoffError,
    InvalidRequestError,
    LayoutMismatchError,
    ModelError,
    PeerUnavailableError,
    RequestCancelledError,
    UnsupportedCallError,
)

_STATUS_OF: tuple[tuple[type[FluxionError], grpc.StatusCode], ...] = (
    (InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (UnsupportedCallError, grpc.StatusCode.UNIMPLEMENTED),
    (CapacityError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (LayoutMismatchError, grpc.StatusCode.FAILED_PRECONDITION),
    (ModelError, grpc.StatusCode.FAILED_PRECONDITION),
    (HandoffError, grpc.StatusCode.DATA_LOSS),
    (PeerUnavailableError, grpc.StatusCode.UNAVAILABLE),
    (DrainingError, grpc.StatusCode.UNAVAILABLE),
    (DeviceError, grpc.StatusCode.UNAVAILABLE),
    (DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (RequestCancelledError, grpc.StatusCode.CANCELLED),
    (AuthenticationError, grpc.StatusCode.UNAUTHENTICATED),
)


class RemoteError(FluxionError):
    """Another node failed with a status that is no error of ours; it keeps the status."""

    def __init__(self, status: grpc.StatusCode, details: str) -> None:
        self.status = status
        super().__init__(f"{status.name}: {details}")


class RemoteInvalidRequestError(InvalidRequestError):
    """The other node found the request invalid."""


class RemoteCapacityError(CapacityError):
    """The other node is full; its own sentence says how much."""

    def __init__(self, details: str) -> None:
        FluxionError.__init__(self, details)


class RemoteLayoutMismatchError(LayoutMismatchError):
    """The other node refused over the KV layout or its model."""

    def __init__(self, details: str) -> None:
        FluxionError.__init__(self, details)


_ERROR_OF: dict[grpc.StatusCode, type[FluxionError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: RemoteInvalidRequestError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: RemoteCapacityError,
    grpc.StatusCode.FAILED_PRECONDITION: RemoteLayoutMismatchError,
    grpc.StatusCode.DATA_LOSS: HandoffError,
    grpc.StatusCode.UNAVAILABLE: PeerUnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.CANCELLED: RequestCancelledError,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
}


def status_of(error: FluxionError) -> grpc.StatusCode:
    """The status that a client sees for an error of ours; INTERNAL for bugs."""
    if isinstance(error, RemoteError):
        return error.status
    for error_type, status in _STATUS_OF:
        if isinstance(error, error_type):
            return status
    return grpc.StatusCode.INTERNAL


def error_from_rpc(error: grpc.RpcError) -> FluxionError:
    """Our error for a failed call, with the other node's sentence."""
    status, details = error.code(), error.details() or "no details"
    error_type = _ERROR_OF.get(status)
    return error_type(details) if error_type else RemoteError(status, details)
