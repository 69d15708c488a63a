"""A request of `vllm.grpc.engine` as one of ours, so that one check serves both services.

Sampling values that are 0 there mean "not given". What would change the answer and is not offered
here is refused by name; what only shapes text is left to the gateway, which makes the text.
"""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.message import Message
from smg_grpc_proto.generated import vllm_engine_pb2

from fluxion_core.errors import InvalidRequestError
from fluxion_core.generation.sampling import MAX_SEED
from fluxion_proto.v1 import generate_pb2
from services.decode.prompt_text import PromptRoom

_PARAMS_NOT_OFFERED = frozenset(
    {"logprobs", "prompt_logprobs", "logit_bias", "truncate_prompt_tokens"}
)
_INPUTS_NOT_OFFERED = frozenset(
    {"mm_inputs", "extra_mm_inputs", "media_refs", "kv_transfer_params", "kv_transfer_params_json"}
)


def prompt_bytes(message: vllm_engine_pb2.GenerateRequest) -> int:
    """Approximate size of a request's prompt: what reading it costs."""
    if message.WhichOneof("input") == "text":
        return len(message.text)
    return 4 * len(message.tokenized.input_ids)


def as_generate_request(
    message: vllm_engine_pb2.GenerateRequest, *, context_tokens: int
) -> generate_pb2.GenerateRequest:
    """Put a request into our own words; its values are not checked here.

    Raises:
        InvalidRequestError: it asks for something that this node does not offer.
        ContextLengthError: it has more tokens than the model's context.
    """
    if unsupported := ", ".join(_unsupported(message)):
        raise InvalidRequestError(f"not offered by this node: {unsupported}; leave it out")
    params = message.sampling_params
    request = generate_pb2.GenerateRequest(
        request_id=message.request_id,
        sampling=generate_pb2.Sampling(
            temperature=params.temperature if params.HasField("temperature") else 1.0,
            top_k=params.top_k,
            top_p=params.top_p or 1.0,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty or 1.0,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            # Seeds are signed there; every number is as good as another.
            seed=params.seed & MAX_SEED if params.HasField("seed") else None,
        ),
        max_new_tokens=params.max_tokens if params.HasField("max_tokens") else None,
        stop_strings=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
    )
    match message.WhichOneof("input"):
        case "tokenized":
            PromptRoom(context_tokens, max_new_tokens=1).check(len(message.tokenized.input_ids))
            request.token_ids.ids.extend(message.tokenized.input_ids)
        case "text":
            request.text = message.text
    return request


def _unsupported(message: vllm_engine_pb2.GenerateRequest) -> Iterator[str]:
    """Names of what was asked for and is not offered."""
    params = message.sampling_params
    if params.n > 1:
        yield f"n = {params.n} (one answer a request)"
    may_end_early = bool(params.stop or params.stop_token_ids) or not params.ignore_eos
    if params.min_tokens and may_end_early:
        yield "min_tokens with anything but max_tokens to end it"
    if constraint := params.WhichOneof("constraint"):
        yield f"structured output ({constraint})"
    yield from _given(params, _PARAMS_NOT_OFFERED)
    yield from _given(message, _INPUTS_NOT_OFFERED)
    if message.data_parallel_rank:
        yield f"data_parallel_rank {message.data_parallel_rank}"


def _given(message: Message, names: frozenset[str]) -> list[str]:
    """Those of the fields that are set."""
    return sorted(names.intersection(field.name for field, _ in message.ListFields()))
