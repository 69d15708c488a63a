"""Settings of a decode node. Read by `services.decode.__main__`; see config/settings.py."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fluxion_core.config.setting_types import (
    AutoByteCount,
    ByteCount,
    Count,
    PeerAddresses,
    Seconds,
)
from fluxion_core.config.settings import ClientSettings, HandoffSettings, NodeSettings, Section
from services.decode.cache_domain import Sharing

DEFAULT_LOCAL_PREFILL_TOKENS = 256
"""Computed here where no hand-off has been seen yet; see EngineSettings.local_prefill_tokens."""


class StoreSettings(Section):
    """The host KV store, and its tier in device memory."""

    host_kv_bytes: ByteCount = 4 << 30
    """Host memory for KV and digests; one arena, reserved as address space at start."""
    device_kv_bytes: AutoByteCount = None
    """Memory of the GPU for the KV that steps read most, a cache of the host's; 0 for none. auto,
    or left out: what is free there once all else has its place, less a reserve of 4 GiB or a tenth
    of the GPU's memory, whichever is more. Never more than the KV that the host has room for."""
    slab_tokens: Count = Field(default=512, ge=128)
    """Tokens of a slab, a power of two: the unit of allocation and of prefix sharing."""
    digest_bits: Count = 16
    """16: exact digests. 8: about half to scan and to hold; blocks are chosen a little worse."""
    populate: bool = False
    """Touch every page at start, so that no request pays for it."""
    sink_tokens: Count = Field(default=64, gt=0)
    """First tokens of every sequence that are always attended to."""
    recent_tokens: Count = Field(default=256, ge=128)
    """Last tokens of every sequence that are always attended to."""
    share_prefixes: Sharing = "client"
    """Who goes on from what is stored of a prompt's beginning. client: the requests of one client,
    that is of one token's or certificate's name; callers who show neither are one client. all:
    everybody, who then can tell by usage and times what others have asked: for clients that trust
    each other. A request's cache_salt divides further."""


class EngineSettings(Section):
    """The step loop."""

    max_running_sequences: Count = Field(default=16, gt=0)
    """Sequences decoded together."""
    max_waiting_requests: Count = 256
    """Requests that may wait for room; the next one is refused."""
    max_waiting_text_bytes: ByteCount = 64 << 20
    """Texts that wait to be cut into tokens; half of it for one client. The next one is refused."""
    default_max_new_tokens: Count = Field(default=256, gt=0)
    """For requests that do not say."""
    default_policy: str = "exact"
    """What is read for requests that name neither quality nor policy: EXACT, ACCURATE, BALANCED or
    FAST, or a policy: exact, fixed(BLOCK_SIZE, BUDGET %), threshold(ERROR) or marginal(PRICE)."""
    predictor_weights: str = "auto"
    """File of the head predictor, as `fluxion train` writes it. auto: the package's own for the
    model, if it has them. none: head profiles are prefill's estimates alone."""
    head_error_one_in: Count = 1000
    """Of so many bytes that attention reads, one is read to measure what quality levels lose
    (fluxion_head_error); 0 for never. Tokens do not change by it. Steps on a GPU do not measure it
    yet, and the log says so."""
    lanes: Literal["auto", "cpu", "gpu", "both"] = "auto"
    """Who attends to host KV: the CPU pool, the GPU lane, or both from one queue. auto is both
    where the model is on a GPU, else cpu."""
    stuck_step_seconds: Seconds = Field(default=120.0, gt=0)
    """A decode step that takes longer is stuck: it is named in the log, and the node ends."""
    local_prefill_tokens: Count | None = None
    """A prompt of which at most so many tokens are not stored yet is computed on this node, any
    other one by a prefill node, which computes all of it; 0 for never here. Left out: by whoever is
    done sooner, as estimated from what chunks and hand-offs took and from what there is to do; here
    if no prefill node is configured."""
    attention_threads: Count | None = Field(default=None, gt=0, le=4096)
    """Threads that attend over host KV and, where the model is on the CPU, compute the dense part;
    if not given, one per usable CPU, an eighth of them (at least one) left to others from 4 CPUs
    on; from 8 CPUs on a measurement at start may find fewer to be faster, and the log says so."""


class PrefillSettings(Section):
    """The prefill nodes that this node pulls KV from."""

    addresses: PeerAddresses = ()
    """host:port of each prefill node."""
    client: ClientSettings = ClientSettings()
    """How they are called."""
    stall_seconds: Seconds = Field(default=10.0, gt=0)
    """A prefill node that sends no KV and does not even say how busy it is for so long has stopped
    or cannot be reached: its hand-off is tried elsewhere."""


class DecodeSettings(NodeSettings):
    """A Fluxion decode node: serves Generate over gRPC, keeps the KV cache in host memory."""

    store: StoreSettings = StoreSettings()
    """Host KV store, its tier in device memory, and default window."""
    engine: EngineSettings = EngineSettings()
    """Batching and queue."""
    prefill: PrefillSettings = PrefillSettings()
    """Where KV comes from."""
    handoff: HandoffSettings = HandoffSettings()
    """How KV comes."""
