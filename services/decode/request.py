"""A Generate request, checked: what the decode node must know before any work is done.

Everything a client can get wrong is found here and named: the field, the limit, the remedy. Not
here: memory (admission.py) and answers (service.py).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from google.protobuf.message import Message

from fluxion_core.errors import ConfigError, ContextLengthError, InvalidRequestError
from fluxion_core.generation.chat import ChatMessage
from fluxion_core.generation.sampling import MAX_SEED, SamplingParams
from fluxion_core.generation.stopping import StopSettings
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.models.config import ModelConfig
from fluxion_core.selector.policy import Policy, parse_policy
from fluxion_core.wire import codec
from fluxion_proto.v1 import generate_pb2
from services.decode.planning import Planning
from services.decode.waiting_line import Priority

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 256
MAX_REQUEST_ID_CHARACTERS = 128
MAX_POLICY_CHARACTERS = 64
MAX_CACHE_SALT_CHARACTERS = 256
OFF_LOOP_BYTES = 32 << 10
"""Messages from this size on are checked on a thread."""

ResultT = TypeVar("ResultT")


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


def check_request(
    message: generate_pb2.GenerateRequest,
    tokenizer: Tokenizer,
    config: ModelConfig,
    *,
    default_max_new_tokens: int,
    planning: Planning,
) -> GenerationRequest:
    """Turn a message into a request that can be run.

    Raises:
        InvalidRequestError: whatever is wrong with it, by field.
    """
    request_id = message.request_id or secrets.token_hex(8)
    if len(request_id) > MAX_REQUEST_ID_CHARACTERS or not request_id.isprintable():
        raise InvalidRequestError(
            f"request_id must be printable and at most {MAX_REQUEST_ID_CHARACTERS} characters"
        )
    policy = _policy(message, planning)
    sampling = codec.sampling_from_proto(message.sampling)
    if not message.sampling.HasField("seed"):
        sampling = replace(sampling, seed=secrets.randbelow(MAX_SEED + 1))
    prompt = prompt_token_ids(message, tokenizer)
    max_new_tokens = _max_new_tokens(message, len(prompt), config, default_max_new_tokens)
    _check_prompt(prompt, max_new_tokens, config)
    stop = _stop_settings(message, config, tokenizer, max_new_tokens)
    return GenerationRequest(
        request_id, prompt, sampling, stop, policy, _priority(message), _cache_salt(message)
    )


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


async def off_loop(message: Message, work: Callable[[], ResultT]) -> ResultT:
    """What `work` makes of a message; of a large one on a thread, so that the event loop goes on.

    Cutting a text into tokens takes about a second per MiB.
    """
    if message.ByteSize() < OFF_LOOP_BYTES:
        return work()
    return await asyncio.to_thread(work)


def prompt_token_ids(
    message: generate_pb2.GenerateRequest | generate_pb2.TokenizeRequest, tokenizer: Tokenizer
) -> list[int]:
    """The prompt's tokens, whichever way it was given.

    Raises:
        InvalidRequestError: none was given, or the model has no chat template.
    """
    match message.WhichOneof("prompt"):
        case "text":
            return tokenizer.encode(message.text)
        case "token_ids" if isinstance(message, generate_pb2.GenerateRequest):
            return list(message.token_ids.ids)
        case "chat":
            messages = [ChatMessage(m.role, m.content) for m in message.chat.messages]
            # The template writes the beginning-of-text token itself where the model wants one.
            return tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False)
        case _:
            raise InvalidRequestError("no prompt; set text, token_ids or chat")


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
    """EXACT, ACCURATE, BALANCED or FAST."""
    name: str = generate_pb2.QualityLevel.Name(level)
    return name.removeprefix("QUALITY_LEVEL_")


def _max_new_tokens(
    message: generate_pb2.GenerateRequest, prompt_tokens: int, config: ModelConfig, default: int
) -> int:
    """What was asked for; left out, the default, as far as the context has room."""
    if not message.HasField("max_new_tokens"):
        return max(1, min(default, config.context_tokens - prompt_tokens))
    if message.max_new_tokens == 0:
        raise InvalidRequestError("max_new_tokens is 0; must be at least 1, or left out")
    return int(message.max_new_tokens)


def _check_prompt(token_ids: Sequence[int], max_new_tokens: int, config: ModelConfig) -> None:
    if not token_ids:
        raise InvalidRequestError("the prompt is empty; send at least one token")
    if (highest := max(token_ids)) >= config.vocab_size:
        raise InvalidRequestError(
            f"token_ids holds {highest}; the vocabulary has ids 0 to {config.vocab_size - 1}"
        )
    if len(token_ids) + max_new_tokens > config.context_tokens:
        raise ContextLengthError(
            prompt_tokens=len(token_ids),
            max_new_tokens=max_new_tokens,
            context_tokens=config.context_tokens,
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
