// Which ISA's table is in use: decided once by cpuid, or by name.
#include "operations/kernel_table.h"

#include <atomic>
#include <cstring>

namespace fluxion {
namespace {

bool runs_here(const KernelTable& table) {
  if (&table == &kAvx512VnniKernels) {
    return __builtin_cpu_supports("avx512vnni") && runs_here(kAvx512Kernels);
  }
  if (&table == &kAvx512Kernels) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (&table == &kAvx2Kernels) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("pclmul");
  }
  return true;
}

const KernelTable* const kTables[] = {&kScalarKernels, &kAvx2Kernels, &kAvx512Kernels,
                                      &kAvx512VnniKernels};

const KernelTable* best() {
  const KernelTable* found = &kScalarKernels;
  for (const KernelTable* table : kTables) {
    if (runs_here(*table)) found = table;
  }
  return found;
}

std::atomic<const KernelTable*>& current() {
  static std::atomic<const KernelTable*> table{best()};
  return table;
}

}  // namespace

const KernelTable& kernels() { return *current().load(std::memory_order_relaxed); }

int available(const char* names[kNumTables]) {
  int count = 0;
  for (const KernelTable* table : kTables) {
    if (runs_here(*table)) names[count++] = table->name;
  }
  return count;
}

bool choose(const char* name) {
  for (const KernelTable* table : kTables) {
    if (std::strcmp(table->name, name) == 0 && runs_here(*table)) {
      current().store(table, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace fluxion
