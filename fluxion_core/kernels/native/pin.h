#pragma once

#include <pthread.h>
#include <sched.h>

namespace fluxion {

// Keep the calling thread on one CPU; -1 leaves it free. A CPU that is not ours to use leaves the
// thread where it is: nothing but speed depends on it.
inline void pin_this_thread(int cpu) {
  if (cpu < 0) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

}  // namespace fluxion
