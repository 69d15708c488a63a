"""Every error that Fluxion raises on purpose, in one tree.

    FluxionError
    ├── InvalidRequestError         the caller asked for something that cannot be; do not retry
    │   ├── ContextLengthError      prompt, or prompt + new tokens, beyond the model's context
    │   └── SamplingError           a sampling value out of its range
    ├── UnsupportedCallError        a method that this node does not offer
    ├── CapacityError               the node is full; retry later or elsewhere
    ├── PeerMismatchError           two nodes cannot work together as they are set
    │   ├── LayoutMismatchError     they disagree on the model or the KV layout
    │   └── NoCommonWayError        they have no way for KV in common
    ├── HandoffError                the KV stream is damaged; nothing of it was committed
    │   ├── FrameFormatError        bad magic, version, kind or length
    │   ├── FrameChecksumError      CRC32C differs
    │   ├── FrameOrderError         a gap, a repeat or an overlap
    │   ├── NonFiniteKvError        K or V holds NaN or an infinity
    │   └── StreamTruncatedError    the stream ended before its trailer
    ├── PeerUnavailableError        the other node is gone or refuses
    ├── DrainingError               this node is going away
    ├── DeadlineError               the deadline passed
    ├── RequestCancelledError       the caller went away
    ├── UnreadAnswerError           the caller does not take its answer
    ├── AuthenticationError         missing or wrong credentials
    ├── ThreadLimitError            the system lets the process have no further thread
    ├── DeviceError                 the GPU failed; only a new process can use it again
    ├── ModelError                  a model cannot be used
    │   ├── ModelNotFoundError      no such file, directory or name
    │   ├── ModelFileError          truncated or malformed file
    │   ├── UnsupportedModelError   an architecture or option that is not implemented
    │   └── NonFiniteLogitsError    no token can be drawn: what the model makes is NaN or infinite
    ├── ConfigError                 a setting is missing or wrong
    └── ShapeError                  tensors disagree; a bug in the calling code

`fluxion_core.wire.status` is the one place that maps these to gRPC statuses.
"""

from __future__ import annotations

from collections.abc import Sequence


class FluxionError(Exception):
    """Root of every error raised on purpose."""


class InvalidRequestError(FluxionError):
    """The request can never succeed as it stands."""


class ContextLengthError(InvalidRequestError):
    """The prompt, with the tokens asked for, does not fit the model's context."""

    def __init__(
        self,
        *,
        prompt_tokens: int,
        max_new_tokens: int,
        context_tokens: int,
        is_at_least: bool = False,
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.context_tokens = context_tokens
        self.is_at_least = is_at_least
        """The prompt was not cut any further: it may have more tokens."""
        count = f"at least {prompt_tokens}" if is_at_least else f"{prompt_tokens}"
        super().__init__(
            f"prompt of {count} tokens plus {max_new_tokens} new tokens exceeds the "
            f"context of {context_tokens} tokens; shorten the prompt or lower max_new_tokens"
        )


class SamplingError(InvalidRequestError):
    """A sampling value is out of its range."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(f"sampling.{field} is {value!r}; allowed: {allowed}")


class UnsupportedCallError(FluxionError):
    """The method is part of the service, but this node does not offer it."""


class CapacityError(FluxionError):
    """The node is full, or the client asks for too much at a time. Retrying later may work."""

    retry_after_seconds: float | None = None
    """When retrying makes sense, if that is known; clients are told."""

    def __init__(
        self,
        resource: str,
        *,
        needed: int,
        free: int,
        unit: str,
        remedy: str,
        retry_after_seconds: float | None = None,
    ) -> None:
        self.resource, self.needed, self.free, self.unit = resource, needed, free, unit
        self.retry_after_seconds = retry_after_seconds
        later = "" if retry_after_seconds is None else f"; retry in {retry_after_seconds:.3g} s"
        super().__init__(f"{resource}: need {needed} {unit}, {free} {unit} free; {remedy}{later}")


class PeerMismatchError(FluxionError):
    """Two nodes cannot work together until one of them is set otherwise."""


class LayoutMismatchError(PeerMismatchError):
    """Two nodes disagree on the model or on the layout of its KV."""

    def __init__(self, field: str, *, expected: object, found: object) -> None:
        self.field, self.expected, self.found = field, expected, found
        super().__init__(
            f"KV layout differs in {field}: this node has {expected!r}, the peer has {found!r}; "
            f"serve the same model revision with the same settings on both nodes"
        )


class NoCommonWayError(PeerMismatchError):
    """A prefill node offers KV in no way that the decode node can take."""

    def __init__(
        self, offered: Sequence[str], asked: Sequence[str], *, is_one_machine: bool
    ) -> None:
        self.offered, self.asked = tuple(offered), tuple(asked)
        where = "" if is_one_machine else "; shared_memory is for nodes on one machine"
        super().__init__(
            f"no way for KV in common: the prefill node has {', '.join(offered)}, the decode node "
            f"{', '.join(asked) or 'none of them'}{where}; set handoff.ways of either node"
        )


class HandoffError(FluxionError):
    """The KV stream is damaged. Nothing of it was committed."""


class FrameFormatError(HandoffError):
    """A frame's header or length is not what the specification allows."""


class FrameChecksumError(HandoffError):
    """A frame's payload does not match its CRC32C."""

    def __init__(self, *, layer: int, first_token: int, expected: int, found: int) -> None:
        self.layer, self.first_token = layer, first_token
        self.expected, self.found = expected, found
        super().__init__(
            f"frame of layer {layer} at token {first_token}: CRC32C {found:#010x}, "
            f"header says {expected:#010x}"
        )


class FrameOrderError(HandoffError):
    """A frame came out of order: a gap, a repeat or an overlap."""

    def __init__(self, *, layer: int, expected_token: int, found_token: int) -> None:
        self.layer, self.expected_token, self.found_token = layer, expected_token, found_token
        kind = "a gap" if found_token > expected_token else "a repeat or an overlap"
        super().__init__(
            f"layer {layer}: expected the frame at token {expected_token}, "
            f"got one at token {found_token} ({kind})"
        )


class NonFiniteKvError(HandoffError):
    """K or V of a token is NaN or infinite, as it came or as a step has made it."""

    def __init__(self, *, layer: int, token: int) -> None:
        self.layer, self.token = layer, token
        super().__init__(
            f"K or V of token {token} in layer {layer} is NaN or infinite; weights or memory of "
            f"the node that computed it may be damaged"
        )


class StreamTruncatedError(HandoffError):
    """The stream ended before every layer was whole and the trailer had come."""


class PeerUnavailableError(FluxionError):
    """The other node is gone, unreachable or refuses."""


class DrainingError(FluxionError):
    """The node is shutting down and takes no new work."""


class DeadlineError(FluxionError):
    """The request's deadline passed."""


class RequestCancelledError(FluxionError):
    """The caller went away, or asked to stop."""


class UnreadAnswerError(FluxionError):
    """The caller took nothing of its answer for too long."""


class AuthenticationError(FluxionError):
    """Credentials are missing or wrong."""


class ThreadLimitError(FluxionError):
    """The system lets this process have no further thread."""

    def __init__(self, *, user_limit: int | None, group_limit: int | None) -> None:
        self.user_limit, self.group_limit = user_limit, group_limit
        limits = ", ".join(
            f"{name} {'unlimited' if limit is None else limit}"
            for name, limit in (("ulimit -u", user_limit), ("pids.max", group_limit))
        )
        super().__init__(
            f"no further thread can be started ({limits}); raise the limit of the user or the "
            f"container, or lower engine.attention_threads and model.threads"
        )


class DeviceError(FluxionError):
    """The GPU failed or got stuck. This process cannot use it again."""


class ModelError(FluxionError):
    """A model cannot be used."""


class ModelNotFoundError(ModelError):
    """No model has this name or lies at this path."""


class ModelFileError(ModelError):
    """A model file is truncated, malformed or contradicts itself."""


class UnsupportedModelError(ModelError):
    """The model is well formed, but asks for something not implemented."""


class NonFiniteLogitsError(ModelError):
    """No token can be drawn from a row of logits. Another node may have sound weights."""

    def __init__(self, largest: float) -> None:
        self.largest = largest
        super().__init__(f"the model's largest logit is {largest}; its weights may be damaged")


class ConfigError(FluxionError):
    """A setting is missing or wrong."""


class ShapeError(FluxionError):
    """Tensors disagree in shape or dtype: a bug in the calling code."""
