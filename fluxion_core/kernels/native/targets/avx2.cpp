#include "kernel_table.h"
#include "simd/avx2.h"

#include "ops/block_digest.inl"
#include "ops/sparse_attention.inl"

const fluxion::KernelTable fluxion::kAvx2Kernels = {"avx2", digest_blocks, copy_past_cache, attend_runs};
