// What Windows has under other names: aligned memory, giving the core to another thread, and a clock.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#if defined(_WIN32)
#include <malloc.h>
// Declared here, since windows.h also defines macros min, max, near, far.
extern "C" __declspec(dllimport) int __stdcall SwitchToThread();
extern "C" __declspec(dllimport) int __stdcall QueryPerformanceCounter(int64_t* count);
extern "C" __declspec(dllimport) int __stdcall QueryPerformanceFrequency(int64_t* counts_per_second);
#else
#include <sched.h>
#include <time.h>
#endif

namespace kp {
namespace {

// Null if memory runs out. The alignment is a power of two.
inline void* allocate_aligned(size_t alignment, size_t bytes) {
#if defined(_WIN32)
  return _aligned_malloc(bytes, alignment);
#else
  void* p = nullptr;
  return posix_memalign(&p, alignment, bytes) ? nullptr : p;
#endif
}

inline void free_aligned(void* p) {
#if defined(_WIN32)
  _aligned_free(p);
#else
  free(p);
#endif
}

inline void yield_core() {
#if defined(_WIN32)
  SwitchToThread();
#else
  sched_yield();
#endif
}

// Seconds of a clock that is never set back.
inline double seconds() {
#if defined(_WIN32)
  int64_t count = 0, counts_per_second = 1;
  QueryPerformanceCounter(&count);
  QueryPerformanceFrequency(&counts_per_second);
  return double(count) / double(counts_per_second);
#else
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
#endif
}

}  // namespace
}  // namespace kp
