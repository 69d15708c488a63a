// How fast this machine's cores read memory: what every other figure is compared with.
#pragma once

#include <cstdint>
#include <vector>

namespace fluxion {

// Seconds in which as many threads as there are `cpus` read all pieces once, each a share of them,
// the next piece prefetched. The threads start together; the slowest counts. `piece_bytes` is a
// multiple of 256.
double read_seconds(const char* const* pieces, int64_t num_pieces, int64_t piece_bytes,
                    const std::vector<int>& cpus);

}  // namespace fluxion
