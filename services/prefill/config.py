"""Settings of a prefill node. Read by `services.prefill.__main__`; see config/settings.py."""

from __future__ import annotations

from pydantic import Field

from fluxion_core.config.setting_types import ByteCount, Count, OptionalListenAddress
from fluxion_core.config.settings import HandoffSettings, NodeSettings, Section

CPU_CHUNK_TOKENS = 512
GPU_CHUNK_TOKENS = 4096
CPU_OUTGOING_BYTES = 64 << 20
GPU_OUTGOING_BYTES = 1 << 30
"""Two chunks of 4,096 tokens of an 8B model. With fewer tokens a chunk its prompts take longer."""


class EngineSettings(Section):
    """The engine that computes prompts."""

    chunk_tokens: Count | None = Field(default=None, ge=16, multiple_of=16)
    """Tokens computed at a time: bounds the memory of activations, and how long one prompt keeps
    the others waiting. If not given, 512 on a CPU and 4096 on a GPU; fewer where the KV of two
    chunks would be more than outgoing_bytes."""
    max_running_prompts: Count = Field(default=8, gt=0)
    """Prompts that may have begun at a time: a short one goes between the chunks of a long one. One
    that pauses for a slow receiver has no place."""
    running_kv_bytes: ByteCount = 8 << 30
    """KV of the prompts that have begun, and KV that is computed and not taken; a prompt that does
    not fit beside the others waits for them. A prompt alone is always computed: the model's context
    bounds it. One prompt counts as seven eighths at most, so that short ones have room beside it:
    an eighth comes on top of the largest prompt's KV."""
    max_waiting_prompts: Count = 64
    """Prompts that may wait for a place; the next one is refused."""
    outgoing_bytes: ByteCount | None = None
    """KV of one prompt that may wait for a slow receiver; then the prompt pauses, others go on. If
    not given, 64 MiB on a CPU and 1 GiB on a GPU. KV that leaves a GPU waits in pinned host memory,
    which grows to what all prompts had waiting at the most, and is kept."""


class PrefillHandoffSettings(HandoffSettings):
    """KV to decode nodes: what it travels on, beside the call that asks for it."""

    listen: OptionalListenAddress = ""
    """host:port that decode nodes connect to for KV by sockets; empty for server.listen's host and
    a free port. They are told the port and use the host that they have called. Give it a fixed port
    where a firewall stands between."""


class PrefillNodeSettings(NodeSettings):
    """A Fluxion prefill node: computes prompts and streams their KV to decode nodes."""

    engine: EngineSettings = EngineSettings()
    """Chunking and queue."""
    handoff: PrefillHandoffSettings = PrefillHandoffSettings()
    """How KV leaves."""
