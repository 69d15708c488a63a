#include "operations/simd/avx512.h"
#include "operations/kernel_table.h"
#include "operations/simd/crc32c_folded.h"

#include "operations/block_digest.inl"
#include "operations/block_score.inl"
#include "operations/block_topk.inl"
#include "operations/bound_statistics.inl"
#include "operations/dense_rows.inl"
#include "operations/layer_rows.inl"
#include "operations/prompt_needs.inl"
#include "operations/read_limit.inl"
#include "operations/span_digest.inl"
#include "operations/span_score.inl"
#include "operations/sparse_attention.inl"
#include "operations/token_weights.inl"

const fluxion::KernelTable fluxion::kAvx512Kernels = {
    "avx512",     digest_blocks, digest_span,  copy_past_cache, score_tiles,      score_spans,
    choose_top,   attend_runs,   read_pieces,  dense_rows,      bound_statistics, dense_rows_bf16,
    add_norm_row, gate_rows,     need_blocks,  add_moments,     penalise_seen,    logit_extremes,
    weigh_block,  bucket_logits, list_between, crc32c_folded};
