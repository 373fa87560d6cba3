// OpenMP, or a replacement with one thread, and scratch memory. Buffer reports failure instead of throwing, because
// exceptions must not leave a parallel region.
#pragma once

#include <stdlib.h>
#include <string.h>

#include "formulas/common.h"
#include "system.h"

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
inline void exchange(T& a, T& b) {
  T old_a = a;
  a = b;
  b = old_a;
}
template <class T>
inline T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T larger(T a, T b) {
  return a < b ? b : a;
}

// Reads a number that another thread of the caller may be writing, exactly once, so that the value that was checked is
// the value that is used.
template <class T>
inline T read_once(const T* p) {
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}

// Uninitialized memory, aligned to 64 bytes, with one more cache line past the end so that whole vectors may be read
// and written there.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free_aligned(data_); }

  // Discards the content. Afterwards data() is not null, even for size 0. Returns false if memory runs out.
  bool resize(int64_t size) {
    if (data_ && size <= size_) return true;
    free_aligned(data_);
    data_ = nullptr;
    size_ = 0;
    size_t bytes = size_t(size) * sizeof(T) + 64;
    // Touching a new 4 KiB page costs 1.4 us; with huge pages the first touch is 8 times faster. The size is rounded up
    // to whole huge pages if that adds at most an eighth: a search of a million points has ten arrays of 4 MB, just
    // below two huge pages.
    constexpr size_t page = size_t(2) << 20;
    const size_t pages = (bytes + page - 1) / page * page;
    if (pages - bytes <= bytes / 8) bytes = pages;
    void* const p = allocate_aligned(bytes >= page ? page : 64, bytes);
    if (!p) return false;
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

// The part [begin, end) of n items that belongs to thread `t` of `threads`.
struct Share {
  int64_t begin, end;
  Share(int64_t n, int t, int threads) : begin(n * t / threads), end(n * (t + 1) / threads) {}
};

// The number of threads worth starting for n items, of which `grain` keep a thread busy for some 20 us. Each gets at
// least 40 us of work: a sleeping thread takes 30 to 50 us to wake, and two threads were faster than one from 60 us of
// work on.
inline int useful_threads(int threads, int64_t n, int64_t grain) {
  return int(larger<int64_t>(1, smaller<int64_t>(threads, n / (2 * grain))));
}

// The number of bits that hold 0, ..., largest.
inline int bits_for(uint64_t largest) {
  return largest ? 64 - __builtin_clzll(largest) : 0;
}

}  // namespace
}  // namespace kp
