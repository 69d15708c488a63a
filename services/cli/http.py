"""GET from a node or the gateway: directly, whatever http_proxy says."""

from __future__ import annotations

from http.client import HTTPResponse
from typing import cast
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

_OPENER = build_opener(ProxyHandler({}))


def get(url: str, *, seconds: float) -> HTTPResponse:
    """The answer, to be closed.

    Raises:
        OSError, HTTPException: nothing answers within `seconds`; an HTTPError for a refusal.
    """
    return cast(HTTPResponse, _OPENER.open(url, timeout=seconds))


def reason_of(error: Exception) -> str:
    """Reason for which nothing came, in the system's words without Python's around them."""
    cause = error.reason if isinstance(error, URLError) else error
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(cause) or type(cause).__name__
