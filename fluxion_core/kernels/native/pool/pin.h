#pragma once

#include <pthread.h>
#include <sched.h>

namespace fluxion {

// Keep a thread on one CPU; -1 leaves it free. A CPU that is not ours to use leaves the thread where
// it is: nothing but speed depends on it.
inline void pin_thread(pthread_t thread, int cpu) {
  if (cpu < 0) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(thread, sizeof set, &set);
}

inline void pin_this_thread(int cpu) { pin_thread(pthread_self(), cpu); }

}  // namespace fluxion
