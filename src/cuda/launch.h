// Helpers of all GPU kernels: grid-stride loops, binary search, order-preserving integers for atomic minima.
#pragma once

#include "formulas/common.h"

namespace kp {
namespace {

constexpr unsigned all_lanes = 0xffffffffu;
constexpr int warp = 32;

__device__ int lane_number() {
  return int(threadIdx.x) % warp;
}
__device__ int64_t first_thread() {
  return int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ int64_t num_threads() {
  return int64_t(gridDim.x) * blockDim.x;
}
__device__ int64_t first_warp() {
  return first_thread() / warp;
}
__device__ int64_t num_warps() {
  return num_threads() / warp;
}

// The first position in [begin, end) whose sorted key is at least `key`; `end` if there is none.
template <class K, class I>
__device__ I lower_bound(const K* keys, I begin, I end, int64_t key) {
  while (begin < end) {
    const I middle = begin + (end - begin) / 2;
    if (keys[middle] < key)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// Maps a number to an integer with the same order, for atomicMin, and back.
__device__ unsigned long long ordered(double x) {
  const unsigned long long bits = (unsigned long long)__double_as_longlong(x);
  return bits >> 63 ? ~bits : bits | 1ull << 63;
}
__device__ double from_ordered(unsigned long long x) {
  return __longlong_as_double((long long)(x >> 63 ? x & ~(1ull << 63) : ~x));
}

constexpr int64_t block_of_rows = 1024;  // rows of a batch item that a thread reduces for one column

// The batch item of row i: the last one that begins at or before it.
__device__ int item_of(const int64_t* splits, int num_items, int64_t i) {
  int low = 0, high = num_items;
  while (low + 1 < high) {
    const int middle = low + (high - low) / 2;
    if (splits[middle] <= i)
      low = middle;
    else
      high = middle;
  }
  return low;
}

}  // namespace
}  // namespace kp
