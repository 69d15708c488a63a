from fluxion_proto.v1 import generate_pb2 as _generate_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Way(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WAY_UNSPECIFIED: _ClassVar[Way]
    GRPC: _ClassVar[Way]
    SOCKETS: _ClassVar[Way]
    SHARED_MEMORY: _ClassVar[Way]
WAY_UNSPECIFIED: Way
GRPC: Way
SOCKETS: Way
SHARED_MEMORY: Way

class Layout(_message.Message):
    __slots__ = ("model_name", "revision_hash", "kv_dtype", "num_layers", "num_kv_heads", "head_dim", "block_tokens", "rope_theta", "tokenizer_fingerprint")
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_HASH_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROPE_THETA_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    model_name: str
    revision_hash: str
    kv_dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    rope_theta: float
    tokenizer_fingerprint: str
    def __init__(self, model_name: _Optional[str] = ..., revision_hash: _Optional[str] = ..., kv_dtype: _Optional[str] = ..., num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., block_tokens: _Optional[int] = ..., rope_theta: _Optional[float] = ..., tokenizer_fingerprint: _Optional[str] = ...) -> None: ...

class HandoffRequest(_message.Message):
    __slots__ = ("request_id", "token_ids", "sampling", "layout", "kv_from_token", "want_prompt_profile", "sink_tokens", "recent_tokens", "ways", "machine", "max_connections")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    KV_FROM_TOKEN_FIELD_NUMBER: _ClassVar[int]
    WANT_PROMPT_PROFILE_FIELD_NUMBER: _ClassVar[int]
    SINK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECENT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WAYS_FIELD_NUMBER: _ClassVar[int]
    MACHINE_FIELD_NUMBER: _ClassVar[int]
    MAX_CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _generate_pb2.Sampling
    layout: Layout
    kv_from_token: int
    want_prompt_profile: bool
    sink_tokens: int
    recent_tokens: int
    ways: _containers.RepeatedScalarFieldContainer[Way]
    machine: str
    max_connections: int
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_generate_pb2.Sampling, _Mapping]] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ..., kv_from_token: _Optional[int] = ..., want_prompt_profile: _Optional[bool] = ..., sink_tokens: _Optional[int] = ..., recent_tokens: _Optional[int] = ..., ways: _Optional[_Iterable[_Union[Way, str]]] = ..., machine: _Optional[str] = ..., max_connections: _Optional[int] = ...) -> None: ...

class HandoffHeader(_message.Message):
    __slots__ = ("layout", "num_tokens", "kv_from_token", "way", "port", "unix_name", "call_id", "secret", "connections", "tls")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_FROM_TOKEN_FIELD_NUMBER: _ClassVar[int]
    WAY_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    UNIX_NAME_FIELD_NUMBER: _ClassVar[int]
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    TLS_FIELD_NUMBER: _ClassVar[int]
    layout: Layout
    num_tokens: int
    kv_from_token: int
    way: Way
    port: int
    unix_name: str
    call_id: bytes
    secret: bytes
    connections: int
    tls: bool
    def __init__(self, layout: _Optional[_Union[Layout, _Mapping]] = ..., num_tokens: _Optional[int] = ..., kv_from_token: _Optional[int] = ..., way: _Optional[_Union[Way, str]] = ..., port: _Optional[int] = ..., unix_name: _Optional[str] = ..., call_id: _Optional[bytes] = ..., secret: _Optional[bytes] = ..., connections: _Optional[int] = ..., tls: _Optional[bool] = ...) -> None: ...

class HandoffTrailer(_message.Message):
    __slots__ = ("first_token_id", "queue_seconds", "prefill_seconds", "num_chunks", "payload_bytes", "prompt_profile")
    FIRST_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    NUM_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_PROFILE_FIELD_NUMBER: _ClassVar[int]
    first_token_id: int
    queue_seconds: float
    prefill_seconds: float
    num_chunks: int
    payload_bytes: int
    prompt_profile: bytes
    def __init__(self, first_token_id: _Optional[int] = ..., queue_seconds: _Optional[float] = ..., prefill_seconds: _Optional[float] = ..., num_chunks: _Optional[int] = ..., payload_bytes: _Optional[int] = ..., prompt_profile: _Optional[bytes] = ...) -> None: ...

class GetPrefillLoadRequest(_message.Message):
    __slots__ = ("prompt_tokens",)
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ...) -> None: ...

class GetPrefillLoadResponse(_message.Message):
    __slots__ = ("running_prompts", "waiting_prompts", "pending_tokens", "layout", "is_draining", "tokens_before", "seconds_before")
    RUNNING_PROMPTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_PROMPTS_FIELD_NUMBER: _ClassVar[int]
    PENDING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    IS_DRAINING_FIELD_NUMBER: _ClassVar[int]
    TOKENS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    SECONDS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    running_prompts: int
    waiting_prompts: int
    pending_tokens: int
    layout: Layout
    is_draining: bool
    tokens_before: int
    seconds_before: float
    def __init__(self, running_prompts: _Optional[int] = ..., waiting_prompts: _Optional[int] = ..., pending_tokens: _Optional[int] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ..., is_draining: _Optional[bool] = ..., tokens_before: _Optional[int] = ..., seconds_before: _Optional[float] = ...) -> None: ...
