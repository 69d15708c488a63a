"""A Generate request, checked: what the decode node must know before any work is done.

Everything a client can get wrong is found here and named: the field, the limit, the remedy. Not
here: memory (admission.py) and answers (service.py).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fluxion_core.errors import ConfigError, InvalidRequestError
from fluxion_core.generation.sampling import MAX_SEED, SamplingParams
from fluxion_core.generation.stopping import StopSettings
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.models.config import ModelConfig
from fluxion_core.planning.policy import Policy, parse_policy
from fluxion_core.wire import codec
from fluxion_proto.v1 import generate_pb2
from services.decode.planning import Planning
from services.decode.prompt_queue import Steps
from services.decode.prompt_text import PromptRoom, prompt_token_ids
from services.decode.waiting_line import Priority

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 256
MAX_REQUEST_ID_CHARACTERS = 128
MAX_POLICY_CHARACTERS = 64
MAX_CACHE_SALT_CHARACTERS = 256


@dataclass(frozen=True)
class GenerationRequest:
    """One checked request."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    stop: StopSettings
    policy: Policy
    priority: Priority = Priority.NORMAL
    cache_salt: str = ""
    """Divides a client's requests into those that share stored KV."""


def read_request(
    message: generate_pb2.GenerateRequest,
    tokenizer: Tokenizer,
    config: ModelConfig,
    *,
    default_max_new_tokens: int,
    planning: Planning,
) -> Steps[GenerationRequest]:
    """Turn a message into a request that can be run; what costs nothing to check is checked first.

    Raises:
        InvalidRequestError: whatever is wrong with it, by field.
    """
    request_id = message.request_id or secrets.token_hex(8)
    if len(request_id) > MAX_REQUEST_ID_CHARACTERS or not request_id.isprintable():
        raise InvalidRequestError(
            f"request_id must be printable and at most {MAX_REQUEST_ID_CHARACTERS} characters"
        )
    policy, priority = _policy(message, planning), _priority(message)
    sampling = codec.sampling_from_proto(message.sampling)
    if not message.sampling.HasField("seed"):
        sampling = replace(sampling, seed=secrets.randbelow(MAX_SEED + 1))
    salt, least_new_tokens = _cache_salt(message), _least_new_tokens(message)
    stop = _stop_settings(message, config, tokenizer, least_new_tokens)
    room = PromptRoom(config.context_tokens, least_new_tokens)
    prompt = yield from prompt_token_ids(message, tokenizer, room)
    _check_prompt(prompt, config)
    if not message.HasField("max_new_tokens"):
        # As far as the context has room.
        most = config.context_tokens - len(prompt)
        stop = replace(stop, max_new_tokens=max(1, min(default_max_new_tokens, most)))
    return GenerationRequest(request_id, prompt, sampling, stop, policy, priority, salt)


def _cache_salt(message: generate_pb2.GenerateRequest) -> str:
    if len(message.cache_salt) > MAX_CACHE_SALT_CHARACTERS:
        raise InvalidRequestError(
            f"cache_salt has {len(message.cache_salt)} characters; at most "
            f"{MAX_CACHE_SALT_CHARACTERS}: send a hash of it"
        )
    return str(message.cache_salt)


def _priority(message: generate_pb2.GenerateRequest) -> Priority:
    match message.priority:
        case generate_pb2.PRIORITY_UNSPECIFIED | generate_pb2.PRIORITY_NORMAL:
            return Priority.NORMAL
        case generate_pb2.PRIORITY_LOW:
            return Priority.LOW
        case generate_pb2.PRIORITY_HIGH:
            return Priority.HIGH
        case other:
            raise InvalidRequestError(
                f"priority is {other}; allowed: PRIORITY_LOW, PRIORITY_NORMAL, PRIORITY_HIGH"
            )


def _policy(message: generate_pb2.GenerateRequest, planning: Planning) -> Policy:
    """What a request reads: its policy, what its quality level means, or the node's default."""
    quality = generate_pb2.QualityLevel
    is_level_given = message.quality != quality.QUALITY_LEVEL_UNSPECIFIED
    if message.HasField("policy"):
        if is_level_given:
            raise InvalidRequestError("quality and policy exclude each other; set one of them")
        if len(message.policy) > MAX_POLICY_CHARACTERS:
            raise InvalidRequestError(f"policy is longer than {MAX_POLICY_CHARACTERS} characters")
        try:
            return parse_policy(message.policy)
        except ConfigError as error:
            raise InvalidRequestError(str(error)) from None
    if not is_level_given:
        return planning.default_policy
    if message.quality not in quality.values():
        served = ", ".join(planning.levels)
        raise InvalidRequestError(f"quality {message.quality} is unknown; one of {served}")
    return planning.levels[level_name(message.quality)]


def level_name(level: int) -> str:
    """Name of the quality level: EXACT, ACCURATE, BALANCED or FAST."""
    name: str = generate_pb2.QualityLevel.Name(level)
    return name.removeprefix("QUALITY_LEVEL_")


def _least_new_tokens(message: generate_pb2.GenerateRequest) -> int:
    """What was asked for; left out, one."""
    if not message.HasField("max_new_tokens"):
        return 1
    if message.max_new_tokens == 0:
        raise InvalidRequestError("max_new_tokens is 0; must be at least 1, or left out")
    return int(message.max_new_tokens)


def _check_prompt(token_ids: Sequence[int], config: ModelConfig) -> None:
    if not token_ids:
        raise InvalidRequestError("the prompt is empty; send at least one token")
    if (highest := max(token_ids)) >= config.vocab_size:
        raise InvalidRequestError(
            f"token_ids holds {highest}; the vocabulary has ids 0 to {config.vocab_size - 1}"
        )


def _stop_settings(
    message: generate_pb2.GenerateRequest,
    config: ModelConfig,
    tokenizer: Tokenizer,
    max_new_tokens: int,
) -> StopSettings:
    if len(message.stop_strings) > MAX_STOP_STRINGS:
        raise InvalidRequestError(
            f"{len(message.stop_strings)} stop_strings; at most {MAX_STOP_STRINGS}"
        )
    for stop in message.stop_strings:
        if not 0 < len(stop) <= MAX_STOP_STRING_CHARACTERS:
            raise InvalidRequestError(
                f"a stop string of {len(stop)} characters; 1 to {MAX_STOP_STRING_CHARACTERS}"
            )
    if len(message.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequestError(
            f"{len(message.stop_token_ids)} stop_token_ids; at most {MAX_STOP_TOKEN_IDS}"
        )
    stop_tokens = _stop_tokens(message.stop_strings, tokenizer)
    return StopSettings(
        max_new_tokens=max_new_tokens,
        stop_strings=tuple(s for s in message.stop_strings if s not in stop_tokens.values()),
        stop_tokens=stop_tokens,
        stop_token_ids=frozenset(message.stop_token_ids),
        eos_token_ids=frozenset(config.eos_token_ids) | tokenizer.eos_token_ids,
        ignore_eos=message.ignore_eos,
    )


def _stop_tokens(stop_strings: Iterable[str], tokenizer: Tokenizer) -> dict[int, str]:
    """Those of the stop strings that are special tokens: no text ever holds them.

    Raises:
        InvalidRequestError: a stop string has a special token in it beside other text.
    """
    found: dict[int, str] = {}
    for stop in stop_strings:
        for text, token_id in tokenizer.special_tokens_in(stop):
            if text != stop and stop not in found.values():
                raise InvalidRequestError(
                    f"stop string {stop!r} holds the special token {text!r}, which is left out of "
                    f"the text, so that it would never end anything; give {text!r} alone, or "
                    f"{token_id} among stop_token_ids"
                )
            found[token_id] = stop
    return found
