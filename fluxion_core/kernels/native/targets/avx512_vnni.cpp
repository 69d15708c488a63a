#include "kernel_table.h"
#include "simd/avx512.h"

#include "ops/block_digest.inl"
#include "ops/block_score.inl"
#include "ops/block_topk.inl"
#include "ops/bound_statistics.inl"
#include "ops/dense_rows.inl"
#include "ops/layer_rows.inl"
#include "ops/read_limit.inl"
#include "ops/span_digest.inl"
#include "ops/span_score.inl"
#include "ops/sparse_attention.inl"
#include "ops/prompt_needs.inl"
#include "ops/token_weights.inl"

const fluxion::KernelTable fluxion::kAvx512VnniKernels = {
    "avx512_vnni",     digest_blocks, digest_span, copy_past_cache, score_tiles,
    score_spans, choose_top,    attend_runs, read_pieces,
    dense_rows,  bound_statistics, dense_rows_bf16, add_norm_row, gate_rows,
    need_blocks, add_moments,
    penalise_seen, logit_extremes, weigh_block, bucket_logits, list_between};
