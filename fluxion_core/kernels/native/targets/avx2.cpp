#include "kernel_table.h"
#include "simd/avx2.h"

#include "ops/block_digest.inl"
#include "ops/block_score.inl"
#include "ops/block_topk.inl"
#include "ops/read_limit.inl"
#include "ops/sparse_attention.inl"

const fluxion::KernelTable fluxion::kAvx2Kernels = {
    "avx2", digest_blocks, copy_past_cache, score_tiles, choose_top, attend_runs, read_pieces};
