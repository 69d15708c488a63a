"""Metrics of a decode node: what they are called and what they mean, as operators read them."""

from __future__ import annotations

from fluxion_core.observe.metrics import MetricDefinition

REQUESTS = MetricDefinition(
    "fluxion_requests_total",
    "counter",
    "requests",
    "Generate requests that ended, by outcome (finished, cancelled, failed) and gRPC status.",
    ("outcome", "status"),
)
REQUESTS_RUNNING = MetricDefinition(
    "fluxion_requests_running",
    "gauge",
    "requests",
    "Requests that hold memory: prefill and decode.",
)
REQUESTS_WAITING = MetricDefinition(
    "fluxion_requests_waiting", "gauge", "requests", "Requests that wait for memory or a place."
)
QUEUE_OLDEST = MetricDefinition(
    "fluxion_queue_oldest_wait_seconds",
    "gauge",
    "seconds",
    "How long the first request of the queue has waited; 0 if nobody waits.",
)
QUEUE_SECONDS = MetricDefinition(
    "fluxion_queue_seconds", "histogram", "seconds", "From a request's arrival to its admission."
)
TIME_TO_FIRST_TOKEN = MetricDefinition(
    "fluxion_time_to_first_token_seconds",
    "histogram",
    "seconds",
    "From a request's arrival to its first token.",
)
INTER_TOKEN = MetricDefinition(
    "fluxion_inter_token_seconds",
    "histogram",
    "seconds",
    "From one token of a request to its next, as they leave for the client.",
)
REQUEST_SECONDS = MetricDefinition(
    "fluxion_request_seconds",
    "histogram",
    "seconds",
    "From a request's arrival to its end, finished requests only.",
)
PROMPT_TOKENS = MetricDefinition(
    "fluxion_prompt_tokens_total",
    "counter",
    "tokens",
    "Prompt tokens of admitted requests, by source: computed by a prefill node, local (computed on "
    "the decode node), or cached in the store.",
    ("source",),
)
PLACEMENTS = MetricDefinition(
    "fluxion_prompt_placements_total",
    "counter",
    "prompts",
    "Admitted prompts by who computes what is missing of them (decode or prefill), and why: the "
    "smaller estimated cost, the operator's setting, no prefill node configured (no_prefill_node), "
    "or no hand-off seen yet (untried).",
    ("computed_by", "reason"),
)
GENERATED_TOKENS = MetricDefinition(
    "fluxion_generated_tokens_total", "counter", "tokens", "Tokens sent to clients."
)
STORE_CAPACITY = MetricDefinition(
    "fluxion_store_capacity_bytes", "gauge", "bytes", "Host memory of the KV store."
)
STORE_BYTES = MetricDefinition(
    "fluxion_store_bytes",
    "gauge",
    "bytes",
    "Host memory by state (free, reserved, used, cached); they add up to the capacity.",
    ("state",),
)
STORE_SHARED = MetricDefinition(
    "fluxion_store_shared_bytes", "gauge", "bytes", "Slabs that more than one sequence holds."
)
STORE_SEQUENCES = MetricDefinition(
    "fluxion_store_sequences", "gauge", "sequences", "Sequences that hold part of the store."
)
PREFILL_ANSWERING = MetricDefinition(
    "fluxion_prefill_nodes_answering",
    "gauge",
    "nodes",
    "Prefill nodes that answered this node's last look and do not drain; 0 without any configured.",
)
HANDOFFS = MetricDefinition(
    "fluxion_handoffs_total",
    "counter",
    "hand-offs",
    "KV hand-offs that were committed, by prefill node, and by the way that KV came: "
    "shared_memory, sockets or grpc.",
    ("node", "way"),
)
HANDOFF_BYTES = MetricDefinition(
    "fluxion_handoff_bytes_total",
    "counter",
    "bytes",
    "KV payload of committed hand-offs, by prefill node, and by the way that it came.",
    ("node", "way"),
)
HANDOFF_SECONDS = MetricDefinition(
    "fluxion_handoff_seconds",
    "histogram",
    "seconds",
    "From the first KV frame of a hand-off to its commit.",
)
HANDOFF_FAILURES = MetricDefinition(
    "fluxion_handoff_failures_total",
    "counter",
    "attempts",
    "Hand-off attempts that failed, by gRPC status; another node may have been tried after.",
    ("reason",),
)
STEPS = MetricDefinition("fluxion_decode_steps_total", "counter", "steps", "Decode steps.")
STEP_TOKENS = MetricDefinition(
    "fluxion_decode_tokens_total",
    "counter",
    "tokens",
    "Tokens that decode steps made; by the steps, the sequences decoded together.",
)
ENGINE_BUSY = MetricDefinition(
    "fluxion_engine_busy_seconds_total", "counter", "seconds", "Engine thread in decode steps."
)
ENGINE_IDLE = MetricDefinition(
    "fluxion_engine_idle_seconds_total", "counter", "seconds", "Engine thread without a sequence."
)
SCANNED = MetricDefinition(
    "fluxion_scanned_bytes_total", "counter", "bytes", "Digests read to choose blocks."
)
ATTENDED = MetricDefinition(
    "fluxion_attended_bytes_total",
    "counter",
    "bytes",
    "K and V read of retrieval regions: unions of what the heads of each group chose.",
)
REGION = MetricDefinition(
    "fluxion_region_bytes_total", "counter", "bytes", "K and V that policy exact would have read."
)
STREAMING_HEADS = MetricDefinition(
    "fluxion_streaming_heads_total",
    "counter",
    "heads",
    "Heads that read nothing of a region, over all layers and steps.",
)
PLANNED_HEADS = MetricDefinition(
    "fluxion_planned_heads_total",
    "counter",
    "heads",
    "All heads where there was a region, over all layers and steps.",
)
GROUPS = MetricDefinition(
    "fluxion_groups_total",
    "counter",
    "groups",
    "GQA groups by what they read of a region: nothing, everything, or blocks of 16 to 128 tokens.",
    ("reads",),
)
HEAD_ERROR = MetricDefinition(
    "fluxion_head_error",
    "gauge",
    "ratio",
    "Root mean square of head output errors of a quality level (or of a kind of policy), over its "
    "last 1,000 samples: true, and as its plans predicted them. Not measured on a GPU.",
    ("level", "error"),
)
HEAD_ERROR_SAMPLES = MetricDefinition(
    "fluxion_head_error_samples_total",
    "counter",
    "samples",
    "Groups of heads whose errors were measured by attending to everything once more.",
    ("level",),
)
HEAD_ERROR_BYTES = MetricDefinition(
    "fluxion_head_error_bytes_total",
    "counter",
    "bytes",
    "K and V read for these samples; in none of the other counters.",
    ("level",),
)
HEAD_ERROR_MISSED = MetricDefinition(
    "fluxion_head_error_missed",
    "gauge",
    "1",
    "1 if a level's mean squared error over these samples is above twice the predicted one by "
    "more than three standard errors, else 0.",
    ("level",),
)
POOL_THREADS = MetricDefinition(
    "fluxion_pool_threads",
    "gauge",
    "threads",
    "Threads of the CPU pool that work on a round of attention, the engine's own included.",
)
POOL_STALLS = MetricDefinition(
    "fluxion_pool_stalls_total",
    "counter",
    "stalls",
    "Times that a thread of the CPU pool was found without its CPU while the others waited for it.",
)
POOL_LEFT_OUT = MetricDefinition(
    "fluxion_pool_left_out_cpus",
    "gauge",
    "cpus",
    "CPUs that the CPU pool does not use now, because its threads were kept waiting there.",
)
TASKS = MetricDefinition(
    "fluxion_tasks_total",
    "counter",
    "tasks",
    "Attention tasks over retrieval regions, by the device that did them.",
    ("device",),
)

DECODE_DEFINITIONS = (
    *(REQUESTS, REQUESTS_RUNNING, REQUESTS_WAITING, QUEUE_OLDEST, QUEUE_SECONDS),
    *(
        TIME_TO_FIRST_TOKEN,
        INTER_TOKEN,
        REQUEST_SECONDS,
        PROMPT_TOKENS,
        PLACEMENTS,
        GENERATED_TOKENS,
    ),
    *(STORE_CAPACITY, STORE_BYTES, STORE_SHARED, STORE_SEQUENCES),
    PREFILL_ANSWERING,
    *(HANDOFFS, HANDOFF_BYTES, HANDOFF_SECONDS, HANDOFF_FAILURES),
    *(STEPS, STEP_TOKENS, ENGINE_BUSY, ENGINE_IDLE),
    *(SCANNED, ATTENDED, REGION, STREAMING_HEADS, PLANNED_HEADS, GROUPS, TASKS),
    *(HEAD_ERROR, HEAD_ERROR_SAMPLES, HEAD_ERROR_BYTES, HEAD_ERROR_MISSED),
    *(POOL_THREADS, POOL_STALLS, POOL_LEFT_OUT),
)
