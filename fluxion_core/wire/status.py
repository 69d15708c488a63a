"""The one table between Fluxion's errors and gRPC statuses, in both directions.

Anything that is not a FluxionError is a bug: the client learns a request id and nothing else, the
log learns the rest.

A status that a node sends carries SENT_KEY. Any other was made by gRPC, of a connection that broke
for example: its text is not for users, and is replaced by a sentence of ours.
"""

from __future__ import annotations

import re

import grpc

from fluxion_core import errors
from fluxion_core.errors import (
    AuthenticationError,
    CapacityError,
    DeadlineError,
    DeviceError,
    DrainingError,
    FluxionError,
    HandoffError,
    InvalidRequestError,
    ModelError,
    NonFiniteLogitsError,
    PeerMismatchError,
    PeerUnavailableError,
    RequestCancelledError,
    ThreadLimitError,
    UnreadAnswerError,
    UnsupportedCallError,
)

SENT_KEY = "fluxion-error"
"""Trailing metadata of every status that a node sends: the kind of error, as in errors.py."""

MAX_DETAILS_BYTES = 6144
"""Of a status's text, as it is encoded. Clients take 8 KiB of trailing metadata; above that their
gRPC makes RESOURCE_EXHAUSTED of any status."""

PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""Trailing metadata that says when to come again, in the name that gRPC's own retries know."""

_STATUS_OF: tuple[tuple[type[FluxionError], grpc.StatusCode], ...] = (
    (InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (UnsupportedCallError, grpc.StatusCode.UNIMPLEMENTED),
    (CapacityError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (ThreadLimitError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (PeerMismatchError, grpc.StatusCode.FAILED_PRECONDITION),
    (NonFiniteLogitsError, grpc.StatusCode.DATA_LOSS),
    (ModelError, grpc.StatusCode.FAILED_PRECONDITION),
    (HandoffError, grpc.StatusCode.DATA_LOSS),
    (PeerUnavailableError, grpc.StatusCode.UNAVAILABLE),
    (DrainingError, grpc.StatusCode.UNAVAILABLE),
    (DeviceError, grpc.StatusCode.UNAVAILABLE),
    (DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (RequestCancelledError, grpc.StatusCode.CANCELLED),
    (UnreadAnswerError, grpc.StatusCode.ABORTED),
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


class RemoteUnavailableError(PeerUnavailableError):
    """The other node answered that it takes no work now; the connection to it is well."""


_ERROR_OF: dict[grpc.StatusCode, type[FluxionError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: RemoteInvalidRequestError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: RemoteCapacityError,
    grpc.StatusCode.FAILED_PRECONDITION: PeerMismatchError,
    grpc.StatusCode.DATA_LOSS: HandoffError,
    grpc.StatusCode.UNAVAILABLE: RemoteUnavailableError,
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


def sent_metadata(error: Exception) -> tuple[str, str]:
    """Metadata that tells the caller that a node sent the status of this error."""
    kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__]
    return SENT_KEY, kinds[0] if kinds else "InternalError"


def sent_details(details: str) -> str:
    """The part of a status's text that clients take, from its beginning."""
    num_bytes = 0
    for place, character in enumerate(details):
        plain = " " <= character <= "~" and character != "%"
        num_bytes += 1 if plain else 3 * len(character.encode(errors="replace"))
        if num_bytes > MAX_DETAILS_BYTES:
            return f"{details[:place]} ... (cut)"
    return details


def error_from_rpc(error: grpc.RpcError) -> FluxionError:
    """Our error for a failed call: with the other node's sentence, or, where it sent none, ours.

    PeerUnavailableError is a connection that could not be made or broke; RemoteUnavailableError is
    a node's answer.
    """
    status, details = error.code(), error.details() or "no details"
    if not any(key == SENT_KEY for key, _ in error.trailing_metadata() or ()):
        if status is grpc.StatusCode.UNAVAILABLE:
            return PeerUnavailableError(_broken_connection(details))
        details = _own_words(status, details)
    error_type = _ERROR_OF.get(status)
    return error_type(details) if error_type else RemoteError(status, details)


def retry_after_seconds(error: grpc.RpcError) -> float | None:
    """Seconds after which a call that failed may be made again, if the node said so."""
    for key, value in error.trailing_metadata() or ():
        if key == PUSHBACK_KEY and value.isascii() and value.isdigit():
            return int(value) / 1000
    return None


_REASONS = (
    *("CERTIFICATE_VERIFY_FAILED", "handshake", "DNS resolution failed", "Connection refused"),
    *("Connection reset", "Connection timed out", "Broken pipe", "Socket closed", "GOAWAY"),
    *("No route to host", "Network is unreachable", "keepalive"),
)
"""Words in gRPC's text that say why there is no connection, the narrowest first."""

_TOO_LARGE = re.compile(r"larger than max \((\d+) vs\. (\d+)\)")


def _broken_connection(details: str) -> str:
    reason = next((one for one in _REASONS if one.lower() in details.lower()), "no reason known")
    return f"the connection could not be made, or it broke ({reason})"


def _own_words(status: grpc.StatusCode, details: str) -> str:
    """A sentence for a status that gRPC made; a server's that is no node of ours stays."""
    if found := _TOO_LARGE.search(details):
        return f"a message has {found[1]} B; its receiver takes {found[2]} B (larger than max)"
    match status:
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return "the deadline passed before the answer came"
        case grpc.StatusCode.CANCELLED:
            return "the call was cancelled"
        case grpc.StatusCode.UNIMPLEMENTED:
            return "there is no such method; is this the address of the right kind of node?"
        case grpc.StatusCode.INTERNAL | grpc.StatusCode.UNKNOWN:
            return "no answer that makes sense; is this the address of a node?"
    return details
