// OpenMP, or its one-thread stand-in; and scratch memory, which reports failure instead of throwing, because nothing
// may throw inside a parallel region.
#pragma once

#include <stdlib.h>
#include <string.h>

#include "formulas/common.h"

#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_thread_num() {
  return 0;
}
static inline int omp_get_num_threads() {
  return 1;
}
#endif

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kp {
namespace {

template <class T>
KP_HD void exchange(T& a, T& b) {
  T was = a;
  a = b;
  b = was;
}
template <class T>
KP_HD T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
KP_HD T larger(T a, T b) {
  return a < b ? b : a;
}

// A number of the caller's, who may be writing to it in another thread: read once, so that what was checked is what is
// used.
template <class T>
inline T read_once(const T* p) {
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}

// Uninitialized, 64-byte aligned, with a cache line to spare past the end so that vectors may overrun.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free(data_); }

  // Keeps nothing of the old content; never null after, even of size 0. False: no memory.
  bool resize(int64_t size) {
    if (data_ && size <= size_) return true;
    free(data_);
    data_ = nullptr;
    size_ = 0;
    size_t bytes = size_t(size) * sizeof(T) + 64;
    // A fresh 4 KiB page costs 1.4 us; huge pages make the first touch 8 times faster, also of the end of the buffer if
    // that is a whole page too: a search of a million points has ten arrays of 4 MB, just below two of these pages.
    constexpr size_t page = size_t(2) << 20;
    const size_t pages = (bytes + page - 1) / page * page;
    if (pages - bytes <= bytes / 8) bytes = pages;
    void* p = nullptr;
    if (posix_memalign(&p, bytes >= page ? page : 64, bytes)) return false;
#if defined(__linux__)
    if (bytes >= page) madvise(p, bytes / page * page, MADV_HUGEPAGE);
#endif
    data_ = static_cast<T*>(p);
    size_ = size;
    return true;
  }
  void swap(Buffer& other) {
    exchange(data_, other.data_);
    exchange(size_, other.size_);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// Thread `t` of `threads` owns [begin, end) of n.
struct Share {
  int64_t begin, end;
  Share(int64_t n, int t, int threads) : begin(n * t / threads), end(n * (t + 1) / threads) {}
};

// Threads worth starting for n items of which `grain` keep one busy for some 20 us. Each is to have twice that to do:
// one that went to sleep takes 30 to 50 us to come, and two were faster than one from 60 us of work on.
inline int useful_threads(int threads, int64_t n, int64_t grain) {
  return int(larger<int64_t>(1, smaller<int64_t>(threads, n / (2 * grain))));
}

inline int bits_for(uint64_t largest) {
  return largest ? 64 - __builtin_clzll(largest) : 0;
}

}  // namespace
}  // namespace kp
