from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class QualityLevel(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    QUALITY_LEVEL_UNSPECIFIED: _ClassVar[QualityLevel]
    QUALITY_LEVEL_EXACT: _ClassVar[QualityLevel]
    QUALITY_LEVEL_ACCURATE: _ClassVar[QualityLevel]
    QUALITY_LEVEL_BALANCED: _ClassVar[QualityLevel]
    QUALITY_LEVEL_FAST: _ClassVar[QualityLevel]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_CANCELLED: _ClassVar[FinishReason]
    FINISH_REASON_ERROR: _ClassVar[FinishReason]

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_LOW: _ClassVar[Priority]
    PRIORITY_NORMAL: _ClassVar[Priority]
    PRIORITY_HIGH: _ClassVar[Priority]

class PromptState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PROMPT_STATE_UNSPECIFIED: _ClassVar[PromptState]
    PROMPT_STATE_QUEUED: _ClassVar[PromptState]
    PROMPT_STATE_PREFILL: _ClassVar[PromptState]
QUALITY_LEVEL_UNSPECIFIED: QualityLevel
QUALITY_LEVEL_EXACT: QualityLevel
QUALITY_LEVEL_ACCURATE: QualityLevel
QUALITY_LEVEL_BALANCED: QualityLevel
QUALITY_LEVEL_FAST: QualityLevel
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_CANCELLED: FinishReason
FINISH_REASON_ERROR: FinishReason
PRIORITY_UNSPECIFIED: Priority
PRIORITY_LOW: Priority
PRIORITY_NORMAL: Priority
PRIORITY_HIGH: Priority
PROMPT_STATE_UNSPECIFIED: PromptState
PROMPT_STATE_QUEUED: PromptState
PROMPT_STATE_PREFILL: PromptState

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class Chat(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "text", "token_ids", "chat", "sampling", "max_new_tokens", "stop_strings", "stop_token_ids", "ignore_eos", "quality", "policy", "priority", "report_progress", "cache_salt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_STRINGS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    REPORT_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    text: str
    token_ids: TokenIds
    chat: Chat
    sampling: Sampling
    max_new_tokens: int
    stop_strings: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    quality: QualityLevel
    policy: str
    priority: Priority
    report_progress: bool
    cache_salt: str
    def __init__(self, request_id: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., max_new_tokens: _Optional[int] = ..., stop_strings: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., quality: _Optional[_Union[QualityLevel, str]] = ..., policy: _Optional[str] = ..., priority: _Optional[_Union[Priority, str]] = ..., report_progress: _Optional[bool] = ..., cache_salt: _Optional[str] = ...) -> None: ...

class PromptProgress(_message.Message):
    __slots__ = ("state", "prompt_tokens", "prompt_tokens_done")
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_DONE_FIELD_NUMBER: _ClassVar[int]
    state: PromptState
    prompt_tokens: int
    prompt_tokens_done: int
    def __init__(self, state: _Optional[_Union[PromptState, str]] = ..., prompt_tokens: _Optional[int] = ..., prompt_tokens_done: _Optional[int] = ...) -> None: ...

class KvReads(_message.Message):
    __slots__ = ("policy", "scanned_bytes_per_token", "attended_bytes_per_token", "share_of_exact", "share_of_fixed_estimate", "streaming_share", "groups_by_block_size", "groups_nothing", "groups_everything", "resident_bytes_per_token")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    SCANNED_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ATTENDED_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SHARE_OF_EXACT_FIELD_NUMBER: _ClassVar[int]
    SHARE_OF_FIXED_ESTIMATE_FIELD_NUMBER: _ClassVar[int]
    STREAMING_SHARE_FIELD_NUMBER: _ClassVar[int]
    GROUPS_BY_BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    GROUPS_NOTHING_FIELD_NUMBER: _ClassVar[int]
    GROUPS_EVERYTHING_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    policy: str
    scanned_bytes_per_token: float
    attended_bytes_per_token: float
    share_of_exact: float
    share_of_fixed_estimate: float
    streaming_share: float
    groups_by_block_size: _containers.RepeatedScalarFieldContainer[int]
    groups_nothing: int
    groups_everything: int
    resident_bytes_per_token: float
    def __init__(self, policy: _Optional[str] = ..., scanned_bytes_per_token: _Optional[float] = ..., attended_bytes_per_token: _Optional[float] = ..., share_of_exact: _Optional[float] = ..., share_of_fixed_estimate: _Optional[float] = ..., streaming_share: _Optional[float] = ..., groups_by_block_size: _Optional[_Iterable[int]] = ..., groups_nothing: _Optional[int] = ..., groups_everything: _Optional[int] = ..., resident_bytes_per_token: _Optional[float] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "cached_tokens", "generated_tokens", "queue_seconds", "prefill_seconds", "handoff_seconds", "decode_seconds", "time_to_first_token_seconds", "handoff_bytes", "kv_bytes_read_per_token", "kv_bytes_in_host_memory", "kv_reads", "local_prompt_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DECODE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TIME_TO_FIRST_TOKEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_READ_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_IN_HOST_MEMORY_FIELD_NUMBER: _ClassVar[int]
    KV_READS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    queue_seconds: float
    prefill_seconds: float
    handoff_seconds: float
    decode_seconds: float
    time_to_first_token_seconds: float
    handoff_bytes: int
    kv_bytes_read_per_token: float
    kv_bytes_in_host_memory: int
    kv_reads: KvReads
    local_prompt_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., queue_seconds: _Optional[float] = ..., prefill_seconds: _Optional[float] = ..., handoff_seconds: _Optional[float] = ..., decode_seconds: _Optional[float] = ..., time_to_first_token_seconds: _Optional[float] = ..., handoff_bytes: _Optional[int] = ..., kv_bytes_read_per_token: _Optional[float] = ..., kv_bytes_in_host_memory: _Optional[int] = ..., kv_reads: _Optional[_Union[KvReads, _Mapping]] = ..., local_prompt_tokens: _Optional[int] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("request_id", "text", "token_ids", "finish_reason", "usage", "progress")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish_reason: FinishReason
    usage: Usage
    progress: PromptProgress
    def __init__(self, request_id: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., progress: _Optional[_Union[PromptProgress, _Mapping]] = ...) -> None: ...

class TokenizeRequest(_message.Message):
    __slots__ = ("text", "chat")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    text: str
    chat: Chat
    def __init__(self, text: _Optional[str] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ...) -> None: ...

class TokenizeResponse(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class GetModelInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LevelPolicy(_message.Message):
    __slots__ = ("level", "policy")
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    level: QualityLevel
    policy: str
    def __init__(self, level: _Optional[_Union[QualityLevel, str]] = ..., policy: _Optional[str] = ...) -> None: ...

class GetModelInfoResponse(_message.Message):
    __slots__ = ("name", "architecture", "revision_hash", "context_tokens", "vocab_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "kv_bytes_per_token", "quality_levels", "has_chat_template", "eos_token_ids", "tokenizer_fingerprint", "device", "level_policies", "default_policy", "predictor_mode", "predictor_fingerprint")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    REVISION_HASH_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_HEADS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    QUALITY_LEVELS_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    LEVEL_POLICIES_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_POLICY_FIELD_NUMBER: _ClassVar[int]
    PREDICTOR_MODE_FIELD_NUMBER: _ClassVar[int]
    PREDICTOR_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    name: str
    architecture: str
    revision_hash: str
    context_tokens: int
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kv_bytes_per_token: int
    quality_levels: _containers.RepeatedScalarFieldContainer[QualityLevel]
    has_chat_template: bool
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    tokenizer_fingerprint: str
    device: str
    level_policies: _containers.RepeatedCompositeFieldContainer[LevelPolicy]
    default_policy: str
    predictor_mode: str
    predictor_fingerprint: str
    def __init__(self, name: _Optional[str] = ..., architecture: _Optional[str] = ..., revision_hash: _Optional[str] = ..., context_tokens: _Optional[int] = ..., vocab_size: _Optional[int] = ..., num_layers: _Optional[int] = ..., num_heads: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., kv_bytes_per_token: _Optional[int] = ..., quality_levels: _Optional[_Iterable[_Union[QualityLevel, str]]] = ..., has_chat_template: _Optional[bool] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., tokenizer_fingerprint: _Optional[str] = ..., device: _Optional[str] = ..., level_policies: _Optional[_Iterable[_Union[LevelPolicy, _Mapping]]] = ..., default_policy: _Optional[str] = ..., predictor_mode: _Optional[str] = ..., predictor_fingerprint: _Optional[str] = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("running_requests", "waiting_requests", "host_kv_capacity_bytes", "host_kv_free_bytes", "host_kv_reserved_bytes", "host_kv_used_bytes", "host_kv_cached_bytes", "generated_tokens_total", "is_draining", "device_kv_capacity_bytes", "device_kv_held_bytes")
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    HOST_KV_CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_KV_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_KV_RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_KV_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_KV_CACHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    IS_DRAINING_FIELD_NUMBER: _ClassVar[int]
    DEVICE_KV_CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_KV_HELD_BYTES_FIELD_NUMBER: _ClassVar[int]
    running_requests: int
    waiting_requests: int
    host_kv_capacity_bytes: int
    host_kv_free_bytes: int
    host_kv_reserved_bytes: int
    host_kv_used_bytes: int
    host_kv_cached_bytes: int
    generated_tokens_total: int
    is_draining: bool
    device_kv_capacity_bytes: int
    device_kv_held_bytes: int
    def __init__(self, running_requests: _Optional[int] = ..., waiting_requests: _Optional[int] = ..., host_kv_capacity_bytes: _Optional[int] = ..., host_kv_free_bytes: _Optional[int] = ..., host_kv_reserved_bytes: _Optional[int] = ..., host_kv_used_bytes: _Optional[int] = ..., host_kv_cached_bytes: _Optional[int] = ..., generated_tokens_total: _Optional[int] = ..., is_draining: _Optional[bool] = ..., device_kv_capacity_bytes: _Optional[int] = ..., device_kv_held_bytes: _Optional[int] = ...) -> None: ...
