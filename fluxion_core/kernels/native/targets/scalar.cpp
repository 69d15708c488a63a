#include "kernel_table.h"
#include "simd/scalar.h"

#include "ops/block_digest.inl"
#include "ops/sparse_attention.inl"

const fluxion::KernelTable fluxion::kScalarKernels = {"scalar", digest_blocks, copy_past_cache, attend_runs};
