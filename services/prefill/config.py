"""Settings of a prefill node. Read by `services.prefill.__main__`; see fluxion_core/config.py."""

from __future__ import annotations

from pydantic import Field

from fluxion_core.config import NodeSettings, Section
from fluxion_core.setting_types import ByteCount, Count

CPU_CHUNK_TOKENS = 512
GPU_CHUNK_TOKENS = 4096


class EngineSettings(Section):
    """How prompts are computed."""

    chunk_tokens: Count | None = Field(default=None, ge=16, multiple_of=16)
    """Tokens computed at a time: bounds the memory of activations, and how long one prompt keeps
    the others waiting. If not given, 512 on a CPU and 4096 on a GPU."""
    max_running_prompts: Count = Field(default=8, gt=0)
    """Prompts computed in turns, a chunk each."""
    running_kv_bytes: ByteCount = 8 << 30
    """KV of the prompts computed in turns; one that does not fit beside the others waits for them.
    A prompt alone is always computed: the model's context bounds it."""
    max_waiting_prompts: Count = 64
    """Prompts that may wait for a place; the next one is refused."""
    outgoing_bytes: ByteCount = 64 << 20
    """KV of one prompt that may wait for a slow receiver; then the prompt pauses, others go on."""


class PrefillNodeSettings(NodeSettings):
    """A Fluxion prefill node: computes prompts and streams their KV to decode nodes."""

    engine: EngineSettings = EngineSettings()
    """Chunking and queue."""
